"""The budget of a run in numbers: what a unit costs, what the dense model has, and what may stay."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cria_dist.config import PruneConfig, RunConfig
from cria_dist.errors import ConfigError, PlanError
from cria_dist.maths.allocation import uniform_widths, units_ratio_for_parameters
from cria_dist.maths.allocation_rooms import Room, check_floors, even_widths, room
from cria_dist.models import depth, experts, residual
from cria_dist.models.attention import attention_shape
from cria_dist.models.macs import macs_of_layers, macs_per_position
from cria_dist.models.mlp import MlpFamily
from cria_dist.models.sizes import sizes_of
from cria_dist.records import Site
from cria_dist.stages.footprint import num_shards, shard_sequences

HELD_OUT = 4
"""One in so many shards of the calibration set is left out of the repair when losses are compared: the last ones."""

CURVE_TOKENS = 8192
"""Held-out tokens that every width of a site is measured on; allocations are compared on all of them. Differences
between losses on the same text need few: a curve costs about (widths + 1) / 2 passes over them, whatever the set."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the ratio is a share of.

    Attributes:
        unit_cost: what leaves with one unit of a site, by site; with a whole layer, what is in none of its units.
        total: what the dense model has of it, also where nothing can be removed.
        measured: cost by width where it was measured and is no multiple of the width, by site (milliseconds).
        needed: fewest units the model computes with, by site; one where nothing is said.
    """

    unit_cost: Mapping[Site, float]
    total: float
    measured: Mapping[Site, tuple[tuple[int, float], ...]] = field(
        default_factory=dict[Site, tuple[tuple[int, float], ...]]
    )
    needed: Mapping[Site, int] = field(default_factory=dict[Site, int])

    def left(self, widths: Mapping[Site, int], prune: PruneConfig, round_index: int) -> float:
        """What may stay at the sites of a dense model after a round; every round takes the same part."""
        removed = prune.ratio * self.total * (round_index + 1) / prune.rounds
        return sum(width * self.unit_cost[site] for site, width in widths.items()) - removed


def budget_of(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], parameters: int) -> Budget:
    """The budget in the measure of ``prune.budget``; ``parameters`` are the dense model's, and stand in for time."""
    widths, measure = sites_of(config, family, model_config), config.prune.budget
    units = {site: width for site, width in widths.items() if site.part != depth.PART}
    if measure == "units":
        return Budget(dict.fromkeys(units, 1), sum(units.values()))
    if measure == "kv_cache":
        size = 2 * attention_shape(model_config).head_dim
        return Budget(dict.fromkeys(units, size), size * sum(units.values()))
    length = family.positions(model_config, config.data.sequence_length)
    whole: Mapping[int, int] = {}
    if measure in ("parameters", "latency"):
        cost, total = {site: family.unit_cost(site, model_config) for site in units}, parameters
    else:
        cost = {site: family.unit_macs(site, model_config, length) for site in units}
        total = macs_per_position(model_config, family, length)
    if len(units) < len(widths):
        sizes = sizes_of(model_config, family).layers
        whole = dict(enumerate(sizes if measure != "macs" else macs_of_layers(model_config, family, length)))
    inside = {layer: sum(cost[site] * units[site] for site in units if site.layer == layer) for layer in whole}
    cost |= {Site(layer, depth.PART): whole[layer] - inside[layer] for layer in whole}
    needed = {site: experts.per_token(model_config) for site in units if site.part == experts.PART}
    return Budget(cost, total, needed=needed)


def sites_of(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any]) -> dict[Site, int]:
    """Units per site that a run may remove, whole layers as sites of one unit among them."""
    widths = family.widths(model_config, config.prune.parts)
    layers = depth.layer_sites(model_config) if "layer" in config.prune.units else ()
    return dict(sorted((widths | dict.fromkeys(layers, 1)).items()))


def final_widths(
    config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], dense_parameters: int
) -> dict[str, int]:
    """Units per site key that the budget leaves when it is spread evenly.

    Raises:
        PlanError: the budget would empty a site, or of several kinds of units leave less than the last ones cost.
    """
    widths = {site.key: width for site, width in family.widths(model_config, config.prune.parts).items()}
    prune, budget = config.prune, budget_of(config, family, model_config, dense_parameters)
    multiple = {key: multiple_of(prune, Site.from_key(key)) for key in widths}
    unit_cost = {site.key: cost for site, cost in budget.unit_cost.items()}
    ratio = units_ratio_for_parameters(widths, unit_cost, budget.total, prune.ratio, prune.budget)
    if len(config.prune.units) == 1:
        kept = uniform_widths(widths, ratio if prune.budget != "units" else prune.ratio, min(multiple.values()))
    else:
        rooms = {key: Room(width, multiple[key], multiple[key], unit_cost[key]) for key, width in widths.items()}
        kept = even_widths(rooms, sum(widths[key] * unit_cost[key] for key in widths) * (1 - ratio))
    unchanged = [key for key, width in widths.items() if kept[key] == width]
    if unchanged and (len(config.prune.units) == 1 or len(unchanged) == len(widths)):
        key = unchanged[0]
        raise PlanError(f"prune.ratio={prune.ratio:g} removes nothing at {key} ({widths[key]} units); raise it")
    return kept


def multiple_of(prune: PruneConfig, site: Site) -> int:
    """New widths of a site are multiples of this: ``prune.multiple`` is for MLPs and the residual stream."""
    return prune.multiple if site.part in ("mlp", *residual.PARTS) else 1


def rooms_of(
    prune: PruneConfig, budget: Budget, dense: Mapping[Site, int], present: Mapping[str, int]
) -> dict[str, Room]:
    """The widths every site may get.

    Args:
        prune: floor, protected layers and multiple.
        budget: what a unit costs.
        dense: units per site of the dense model; the floor is a share of them. A whole layer may go.
        present: units per site key of the model that is pruned.

    Raises:
        ConfigError: a layer that the model does not have is protected.
    """
    layers = 1 + max(site.layer for site in dense)
    beyond = [layer for layer in prune.protect if not -layers <= layer < layers]
    if beyond:
        raise ConfigError(
            f"prune.protect names layer {beyond[0]}, but the model has layers 0 to {layers - 1} (-1 is the last); "
            "correct it"
        )
    protected = {layer % layers for layer in prune.protect}
    rooms: dict[str, Room] = {}
    for site, width in dense.items():
        here, multiple, cost = present[site.key], multiple_of(prune, site), budget.unit_cost[site]
        needed = budget.needed.get(site, 1)
        smallest = 0 if site.part == depth.PART else max(needed, room(width, prune.floor, multiple, cost).smallest)
        smallest = here if site.layer in protected else min(smallest, here)
        rooms[site.key] = Room(here, smallest, multiple, cost, budget.measured.get(site, ()))
    return rooms


def inside_layers(keys: Collection[str]) -> dict[str, list[str]]:
    """The sites within each whole layer that is a site itself, by keys."""
    sites = {key: Site.from_key(key) for key in keys}
    return {
        whole: [key for key, site in sites.items() if key != whole and site.layer == sites[whole].layer]
        for whole in sites
        if sites[whole].part == depth.PART
    }


def fewest_units(
    config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], dense_parameters: int
) -> dict[str, int]:
    """The least width any allocation of the run may give each site, after checking that there can be one.

    Raises:
        ConfigError: a layer that the model does not have is protected, or all are; the loss cannot be measured.
        PlanError: the floors keep more than the budget allows.
    """
    prune, allocation = config.prune, config.prune.allocation
    dense = sites_of(config, family, model_config)
    budget = budget_of(config, family, model_config, dense_parameters)
    if family.takes != "tokens" or config.method.unit != "mlp":
        what = f"model_type {family.model_type!r} takes {family.takes}" if family.takes != "tokens" else ""
        what = what or f"{config.method.title} removes units of another kind"
        raise ConfigError(
            f"prune.allocation={allocation} compares losses of language models with fewer units, and {what}; "
            "use prune.allocation=uniform, and a prune.budget other than latency"
        )
    if num_shards(config) < 2:
        raise ConfigError(
            f"prune.allocation={allocation} compares losses on the last shards of the calibration set, and all of it "
            f"is one shard; lower record.shard_sequences={shard_sequences(config)} or raise data.calibration_sequences"
        )
    rooms = rooms_of(prune, budget, dense, {site.key: width for site, width in dense.items()})
    if all(one.smallest == one.width for one in rooms.values()):
        raise ConfigError(
            f"prune.protect={list(prune.protect)}, prune.floor={prune.floor:g} and prune.multiple={prune.multiple} "
            "leave nothing to prune; protect fewer layers or lower the others"
        )
    if prune.budget != "latency":  # times are measured when scores are there
        left = budget.left(dense, prune, prune.rounds - 1)
        check_floors(rooms, left, budget.total, prune.ratio, inside_layers(rooms))
    return {key: one.smallest for key, one in rooms.items() if Site.from_key(key).part != depth.PART}


def held_out(config: RunConfig) -> tuple[int, range]:
    """Shards that the repair may see when losses are compared, and the sequences of the others."""
    shards = num_shards(config)
    seen = shards - max(1, shards // HELD_OUT)
    return seen, range(seen * shard_sequences(config), config.data.calibration_sequences)
