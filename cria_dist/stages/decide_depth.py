"""Decide on whole layers: a budget becomes a number of layers, and the layers that stay become a plan."""

import math
from collections.abc import Collection, Mapping, Sequence

from cria_dist.config import RunConfig
from cria_dist.errors import PlanError
from cria_dist.models import depth
from cria_dist.models.macs import macs_of_layers, macs_per_position
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.models.sizes import sizes_of
from cria_dist.records import PruningPlan, Site


def layers_to_remove(config: RunConfig, family: MlpFamily, model_config: ModelDict, dense_parameters: int) -> int:
    """The fewest layers that make up at least ``prune.ratio`` of what ``prune.budget`` measures, whichever they are.

    Raises:
        PlanError: no layer would be left.
    """
    ratio, budget, layers = config.prune.ratio, config.prune.budget, int(model_config["num_hidden_layers"])
    cost, total = 1, layers
    if budget == "parameters":
        cost, total = min(sizes_of(model_config, family).layers), dense_parameters
    elif budget == "macs":
        length = family.positions(model_config, config.data.sequence_length)
        cost = min(macs_of_layers(model_config, family, length))
        total = macs_per_position(model_config, family, length)
    count = math.ceil(ratio * total / cost - 1e-9)
    if count >= layers:
        share = f"the {layers} layers" if budget == "units" else f"all {total:,} {budget}"
        raise PlanError(
            f"prune.ratio={ratio:g} of {share} takes {count} layers of {layers}, and one must stay; lower prune.ratio"
        )
    return count


def removed_after_round(count: int, rounds: int, index: int) -> int:
    """Layers gone after round ``index`` (0-based) of ``rounds`` about equal steps; the last one reaches ``count``."""
    return count * (index + 1) // rounds


def layers_of(plan: PruningPlan | None, total: int) -> tuple[int, ...]:
    """Layers of the model a plan left, in the numbering of the dense model with ``total`` layers."""
    if plan is None:
        return tuple(range(total))
    return tuple(sorted(Site.from_key(key).layer for key, units in plan.kept.items() if units))


def depth_plan(kept: Collection[int], parameters: Sequence[int], dense: int, method: str, digest: str) -> PruningPlan:
    """Account for the layers that leave the model and write it all down.

    Args:
        kept: layers that stay, in the numbering of the dense model.
        parameters: of every layer of the dense model.
        dense: parameters of the dense model.
        method: title of the method.
        digest: digest of everything the decision was made from.
    """
    removed = sum(size for layer, size in enumerate(parameters) if layer not in kept)
    keys = {layer: Site(layer, depth.PART).key for layer in range(len(parameters))}
    return PruningPlan(
        kept={key: (0,) if layer in kept else () for layer, key in keys.items()},
        widths=dict.fromkeys(keys.values(), 1),
        method=method,
        ratio=removed / dense,
        parameters=(dense, dense - removed),
        digest=digest,
    )


def local_layers(plan: PruningPlan, previous: PruningPlan) -> Mapping[str, tuple[int, ...]]:
    """The plan in the numbering of the model that the previous round left."""
    there = layers_of(previous, len(previous.kept))
    return {Site(number, depth.PART).key: plan.kept[Site(layer, depth.PART).key] for number, layer in enumerate(there)}
