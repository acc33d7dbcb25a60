"""What the stages of a run need of a worker's memory, and whether it fits: as plain data for display."""

from collections.abc import Mapping
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.stages import memory, schedule
from cria_dist.stages.analyse import widest_site
from cria_dist.stages.answers import FLOAT32, usable_bytes
from cria_dist.stages.estimate_left import Left
from cria_dist.stages.estimate_recover import recovery_bytes, recovery_remedies, training_workers
from cria_dist.stages.footprint import Workload, in_units, itemsize
from cria_dist.stages.repair_steps import solver_bytes


def to_record(config: RunConfig, work: Workload, workers: int) -> dict[str, object]:
    """What every schedule needs, whether it fits, and which one ``record.schedule`` comes to."""
    available = memory.of_machine(config, workers)
    found: dict[str, object] = {"workers": workers, "memory.per_worker": in_units(available)}
    for kind in schedule.KINDS:
        layout = schedule.best_layout(kind, work, workers, available)
        found[f"memory.{kind}"] = "not with these workers"
        if layout is not None:
            total = schedule.peak(work, *layout).total
            found[f"memory.{kind}"] = f"{_fits(total, available)}: {schedule.in_words(kind, layout, workers)}"
    try:
        chosen = schedule.decide(work, workers, available, config.record.schedule)
    except ConfigError as error:
        return {**found, "schedule": f"none: {error}"}
    return {**found, "schedule": f"{chosen.kind}: {chosen.reason}"}


def to_evaluate(config: RunConfig, parameters: int, prunable: int, workers: int) -> dict[str, object]:
    """What one worker holds that measures losses: the whole model, and the maps of one that is pruned in memory.

    Then what the one that compares the result with its reference takes of this machine's main memory, in float32,
    wherever the run computes.
    """
    item, available = itemsize(config.model.dtype), memory.of_machine(config, workers)
    copied = prunable if config.compare or config.prune.repair != "none" else 0
    redone = item * (parameters + prunable) if config.prune.rounds == 1 else 0
    compared = _fits(max(redone, FLOAT32 * parameters), usable_bytes())
    return {
        "memory.evaluate": f"{_fits((parameters + copied) * item, available)}: a worker holds the whole model, at most "
        "one per device",
        "memory.verify": f"at most {compared}: one worker's main memory, to compare the result with its reference in "
        "float32; what does not fit is not tried",
    }


def to_repair(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any]) -> dict[str, object]:
    """What solving the widest site of a sequential repair takes, if all of its units stay."""
    if config.prune.repair != "sequential":
        return {}
    signals, outputs = widest_site(family, model_config, config.prune.parts), int(model_config["hidden_size"])
    return {"memory.repair": f"{in_units(solver_bytes(signals, outputs))}: one worker at a time solves a site"}


def to_recover(config: RunConfig, model_config: ModelDict, left: Left) -> dict[str, object]:
    """What a training worker holds, and what to do where that does not fit."""
    size = recovery_bytes(config, model_config, left)
    available = memory.of_machine(config, training_workers(config))
    remedy = f": {recovery_remedies(config)}" if size > available else ""
    return {"memory.recover": f"{_fits(size, available, ' per worker, without activations')}{remedy}"}


def _fits(size: int, available: int, what: str = "") -> str:
    return f"{in_units(size)}{what}, {'fits' if size <= available else 'does not fit'}"
