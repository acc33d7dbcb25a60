"""Decide on single weights: a budget becomes a share of zeros, the same in every map, and an account of them."""

from collections.abc import Mapping
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, PlanError
from cria_dist.methods.weights import WeightMethod
from cria_dist.models.macs import macs_per_position
from cria_dist.models.mlp import MlpFamily
from cria_dist.records import PruningPlan, Site
from cria_dist.stages.sparsify import map_sizes


def zero_share(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], dense_parameters: int) -> float:
    """Share of the weights of the units' maps that become zero for ``prune.ratio`` of what ``prune.budget`` measures.

    Raises:
        PlanError: nothing would be left of a map, or nothing would become zero.
    """
    ratio, budget = config.prune.ratio, config.prune.budget
    sizes = map_sizes(model_config)
    weights, smallest = sum(sizes), min(sizes)
    totals, held = {"units": weights, "parameters": dense_parameters}, weights
    if budget == "macs":
        length = family.positions(model_config, config.data.sequence_length)
        widths = family.widths(model_config)
        held = sum(family.unit_macs(site, model_config, length) * width for site, width in widths.items())
        totals["macs"] = macs_per_position(model_config, family, length)
    share = ratio * totals[budget] / held
    what = f"{weights:,} weights" if budget == "units" else f"all {totals[budget]:,} {budget}"
    if round(share * smallest) >= smallest:
        raise PlanError(
            f"prune.ratio={ratio:g} of {what} leaves nothing of the maps' {weights:,} weights; lower prune.ratio"
        )
    if not round(share * smallest):
        raise PlanError(f"prune.ratio={ratio:g} makes none of {smallest:,} weights of a map zero; raise prune.ratio")
    return share


def check_weight_methods(
    config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], dense_parameters: int
) -> None:
    """Weights must be left, and a run that prunes single weights does it once.

    Raises:
        ConfigError: more than one round.
        PlanError: the ratio leaves nothing, or removes nothing.
    """
    if not any(isinstance(method, WeightMethod) for method in (config.method, *config.compare)):
        return
    zero_share(config, family, model_config, dense_parameters)
    if isinstance(config.method, WeightMethod) and config.prune.rounds > 1:
        raise ConfigError(
            f"{config.method.title} looks at the weights only, so that rounds would find the same; "
            f"set prune.rounds=1 (it is {config.prune.rounds})"
        )


def weights_plan(widths: Mapping[Site, int], zeros: int, dense: int, method: str, digest: str) -> PruningPlan:
    """A plan in which every unit stays: the reduction counts the zeros, which remain where they are.

    Args:
        widths: units per site.
        zeros: weights that are zero.
        dense: parameters of the dense model; those of the pruned model are the ones that are not zero.
        method: title of the method.
        digest: digest of everything the decision was made from.
    """
    return PruningPlan(
        kept={site.key: tuple(range(width)) for site, width in sorted(widths.items())},
        widths={site.key: width for site, width in sorted(widths.items())},
        method=method,
        ratio=zeros / dense,
        parameters=(dense, dense - zeros),
        digest=digest,
    )
