"""What a run leaves of a model, as far as that is known before anything is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.methods.layers import LayerMethod
from cria_dist.models import checkpoint
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.models.sizes import sizes_of
from cria_dist.stages.budget import final_widths
from cria_dist.stages.decide_depth import layers_to_remove


@dataclass(frozen=True, slots=True)
class Left:
    """A pruned model in numbers.

    Attributes:
        model_config: its config.json where its widths are known, else that of the dense model.
        parameters: it has so many, or at most so many; those that become zero are still there.
        found: what is known of it, as plain data for display.
    """

    model_config: ModelDict
    parameters: int
    found: Mapping[str, Any]


def left_of(config: RunConfig, family: MlpFamily, model_config: ModelDict, dense: int) -> Left:
    """What the budget leaves.

    Args:
        config: the run, which has been checked against the model.
        family: adapter of the model's family.
        model_config: config.json of the dense model.
        dense: its parameters.
    """
    prune, method = config.prune, config.method
    if method.unit == "mlp" and prune.allocation == "uniform":
        kept = final_widths(config, family, model_config, dense)
        narrow = family.narrowed(model_config, kept, prune.repair == "bias")
        left = checkpoint.count_parameters(narrow)
        return Left(narrow, left, {"left.units_per_site": max(kept.values()), "left.parameters": left})
    if isinstance(method, LayerMethod) and method.tolerance is None:
        layers = sizes_of(model_config, family).layers
        gone = layers_to_remove(config, family, model_config, dense)
        left = dense - gone * min(layers)
        return Left(model_config, left, {"left.layers": len(layers) - gone, "left.parameters": left})
    left = dense
    if prune.budget == "parameters" and method.unit == "mlp":
        left -= int(prune.ratio * dense)
    by = f"prune.allocation={prune.allocation}" if method.unit == "mlp" else method.title
    measured = f"{1 - prune.ratio:g} of what prune.budget={prune.budget} measures, spread by {by}"
    return Left(model_config, left, {"left.budget": measured})
