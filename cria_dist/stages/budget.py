"""The budget of a run in numbers: what a unit costs, what the dense model has, and what may stay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cria_dist.config import PruneConfig, RunConfig
from cria_dist.errors import ConfigError, PlanError
from cria_dist.maths.allocation import uniform_widths, units_ratio_for_parameters
from cria_dist.maths.allocation_rooms import Room, check_floors, even_widths, room
from cria_dist.models.macs import macs_per_position
from cria_dist.models.mlp import MlpFamily
from cria_dist.records import Site
from cria_dist.stages.footprint import num_shards, shard_sequences

HELD_OUT = 4
"""One in so many shards of the calibration set is left out of the repair when losses are compared: the last ones."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the ratio is a share of.

    Attributes:
        unit_cost: what leaves with one unit.
        total: what the dense model has of it, also where nothing can be removed.
    """

    unit_cost: int
    total: int

    def left(self, widths: Mapping[Site, int], prune: PruneConfig, round_index: int) -> float:
        """What may stay at the sites of a dense model after a round; every round takes the same part."""
        removed = prune.ratio * self.total * (round_index + 1) / prune.rounds
        return sum(widths.values()) * self.unit_cost - removed


def budget_of(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], parameters: int) -> Budget:
    """The budget in the measure of ``prune.budget``; ``parameters`` are the dense model's."""
    if config.prune.budget == "parameters":
        return Budget(family.unit_cost(model_config), parameters)
    if config.prune.budget == "macs":
        length = family.positions(model_config, config.data.sequence_length)
        return Budget(family.unit_macs(model_config), macs_per_position(model_config, family, length))
    return Budget(1, sum(family.widths(model_config).values()))


def final_widths(
    config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], dense_parameters: int
) -> dict[str, int]:
    """Units per site key that the budget leaves when it is spread evenly.

    Raises:
        PlanError: the budget would empty a site.
    """
    widths = {site.key: width for site, width in family.widths(model_config).items()}
    ratio, measure = config.prune.ratio, config.prune.budget
    if measure != "units":
        budget = budget_of(config, family, model_config, dense_parameters)
        unit_cost = dict.fromkeys(widths, budget.unit_cost)
        ratio = units_ratio_for_parameters(widths, unit_cost, budget.total, ratio, measure)
    kept = uniform_widths(widths, ratio, config.prune.multiple)
    for key, width in widths.items():
        if kept[key] == width:
            raise PlanError(f"prune.ratio={config.prune.ratio:g} removes nothing at {key} ({width} units); raise it")
    return kept


def rooms_of(
    prune: PruneConfig, budget: Budget, dense: Mapping[Site, int], present: Mapping[str, int]
) -> dict[str, Room]:
    """The widths every site may get.

    Args:
        prune: floor, protected layers and multiple.
        budget: what a unit costs.
        dense: units per site of the dense model; the floor is a share of them.
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
        here = present[site.key]
        smallest = room(width, prune.floor, prune.multiple, budget.unit_cost).smallest
        smallest = here if site.layer in protected else min(smallest, here)
        rooms[site.key] = Room(here, smallest, prune.multiple, budget.unit_cost)
    return rooms


def fewest_units(
    config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], dense_parameters: int
) -> dict[str, int]:
    """The least width any allocation of the run may give each site, after checking that there can be one.

    Raises:
        ConfigError: a layer that the model does not have is protected, or all are; the loss cannot be measured.
        PlanError: the floors keep more than the budget allows.
    """
    prune, allocation = config.prune, config.prune.allocation
    dense = family.widths(model_config)
    budget = budget_of(config, family, model_config, dense_parameters)
    if family.takes == "images" or config.method.unit != "mlp":
        what = f"model_type {family.model_type!r} takes images" if family.takes == "images" else ""
        what = what or f"{config.method.title} removes units of another kind"
        raise ConfigError(
            f"prune.allocation={allocation} compares losses of language models with fewer MLP neurons, and {what}; "
            "use prune.allocation=uniform"
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
    left = budget.left(dense, prune, prune.rounds - 1)
    check_floors(rooms, left, budget.total, prune.ratio)
    even_widths(rooms, left)  # what the result is compared with must be possible too
    return {key: one.smallest for key, one in rooms.items()}


def held_out(config: RunConfig) -> tuple[int, range]:
    """Shards that the repair may see when losses are compared, and the sequences of the others."""
    shards = num_shards(config)
    seen = shards - max(1, shards // HELD_OUT)
    return seen, range(seen * shard_sequences(config), config.data.calibration_sequences)
