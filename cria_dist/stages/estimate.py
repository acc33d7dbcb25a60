"""What a run will take, from configuration and shapes alone; no weights are read unless a probe is asked for."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, location
from cria_dist.models.family import family_of
from cria_dist.models.mlp import MlpFamily
from cria_dist.stages import memory, probe, schedule
from cria_dist.stages.analyse import analyst_bytes, widest_site
from cria_dist.stages.check_tensors import check_sizes, check_tensors
from cria_dist.stages.footprint import Workload, in_units, itemsize, num_shards, signal_dtype
from cria_dist.stages.repair_steps import solver_bytes
from cria_dist.store.moments import stored_bytes

RECORDED = ("signals", "moments", "boundaries")
"""What lies in ``record.storage`` where there is one."""


def bytes_of_run(
    config: RunConfig, model_config: Mapping[str, Any], family: MlpFamily, parameters: int
) -> dict[str, int]:
    """Bytes the run writes: inputs, recording, hidden states between blocks, repair (peaks), checkpoints, recovery."""
    units = family.widths(model_config, config.prune.parts)
    widths = [width * family.span(site, model_config) for site, width in units.items()]
    sequences, length = config.data.calibration_sequences, config.data.sequence_length
    tokens = sequences * family.positions(model_config, length)
    recovers = config.recover.steps > 0 and (family.takes == "tokens" or config.data.labelled)
    hidden_states = tokens * int(model_config["hidden_size"]) * itemsize(config.model.dtype)
    model_bytes = parameters * itemsize(str(model_config.get("dtype") or model_config.get("torch_dtype") or "float32"))
    rounds = config.prune.rounds
    layers, hidden_size = int(model_config["num_hidden_layers"]), int(model_config["hidden_size"])
    around_layers = (layers + 1) * hidden_size * config.records_hidden
    numbers = sum(widths) * family.signals() + around_layers
    masked = sum(method.unit == "weight" for method in (config.method, *config.compare))
    # hidden states of both models before and behind a layer, sums of products at a site
    repair = 4 * hidden_states + 4 * num_shards(config) * max(
        (width * (width + hidden_size) for width in widths), default=0
    )
    # masked maps and sparse copies, at most as large as the model
    sparse = masked + (rounds + recovers) * (config.method.unit == "weight")
    return {
        "inputs": 4 * sequences * math.prod(family.input_shape(model_config, length)),
        "signals": rounds * config.record.tokens * numbers * itemsize(signal_dtype(config)),
        "moments": rounds * num_shards(config) * sum(map(stored_bytes, widths)),
        "boundaries": 0 if config.record.schedule == "replicate" else hidden_states,
        "repair": repair if config.prune.repair == "sequential" else 0,
        "checkpoints": model_bytes * (rounds + recovers + sparse),
        "recovery_state": 2 * 12 * parameters * recovers,
    }


def estimate(config: RunConfig, measured: bool = False) -> dict[str, object]:
    """Parameters, storage, memory, schedule, work and time of a run, as plain data for display.

    Args:
        config: the run.
        measured: take the time from recording a part of the model in this process; else from matrix products.

    Raises:
        ConfigError: the model cannot be found or its family is not known, or what is there of it is damaged.
    """
    directory = location.locate(config.model.path, config.model.revision, weights=measured)
    model_config = checkpoint.read_config(directory)
    family = family_of(model_config)
    check = check_tensors if checkpoint.is_complete(directory) else check_sizes
    check(directory, family, model_config)
    work = Workload(config, model_config)
    widest, signals = max(work.sizes.widths), widest_site(family, model_config, work.parts)
    storage = bytes_of_run(config, model_config, family, work.sizes.parameters)
    forward, moments = flop(config, work)
    workers = workers_assumed(config)
    seconds = _probed(config, work, workers, directory) if measured else _at_best(config, work, workers)
    widths = family.widths(model_config, config.prune.parts)
    prunable = sum(width * family.unit_cost(site, model_config) for site, width in widths.items())
    return {
        "parameters": work.sizes.parameters,
        "prunable_parameters": prunable - family.removed_twice(model_config, {site.key: () for site in widths}),
        "sites": len(widths),
        "units_per_site": widest,
        "calibration_tokens": config.data.calibration_sequences * work.length,
        "shards": num_shards(config),
        **{f"storage_bytes.{name}": size for name, size in storage.items()},
        "storage_bytes.total": sum(storage.values()),
        **_advice(config, storage),
        **_memory(config, work, workers),
        "memory.evaluate": _memory_to_evaluate(config, work.sizes.parameters, prunable, workers),
        **_memory_to_repair(config, family, model_config),
        "analyst_memory_bytes": max(
            analyst_bytes(method.needs, config.record.tokens, signals, work.sizes.hidden)
            for method in (config.method, *config.compare)
        ),
        "forward_flop": forward,
        "moments_flop": moments,
        "repair_flop": repair_flop(config, work),
        "seconds": round(seconds, 1),
        "seconds.repair": round(seconds * repair_flop(config, work) / (forward + moments), 1),
        "seconds.basis": f"record, {workers} workers as fast as this process; "
        + ("one batch through the first and a middle layer" if measured else "matrix products, hence at best")
        + "; repair in sequence, as fast as that" * (config.prune.repair == "sequential"),
    }


def flop(config: RunConfig, work: Workload) -> tuple[int, int]:
    """Floating-point operations to record: forward passes (full T x T attention, no head), sums of products."""
    sizes = work.sizes
    tokens = config.data.calibration_sequences * work.length * config.prune.rounds
    attention = 4 * work.length * sizes.heads * sizes.head_dim * work.layers
    return tokens * (2 * sum(sizes.layers) + attention), tokens * 2 * sum(width * width for width in sizes.widths)


def repair_flop(config: RunConfig, work: Workload) -> int:
    """Floating-point operations of a sequential repair, at most: both models at every site, what is left once more."""
    if config.prune.repair != "sequential":
        return 0
    forward, moments = flop(config, work)
    tokens = config.data.calibration_sequences * work.length * config.prune.rounds
    return (2 * len(work.parts) + 1) * forward + moments + 2 * tokens * sum(work.sizes.widths) * work.sizes.hidden


def workers_assumed(config: RunConfig) -> int:
    """Workers a run on this machine would have."""
    if config.run.pool == "local":
        return 1
    return config.run.workers or torch.cuda.device_count() or os.cpu_count() or 1


def _advice(config: RunConfig, storage: Mapping[str, int]) -> dict[str, object]:
    """Moments are most of what is stored: say which shards would halve the total, as far as shards can be merged."""
    others = sum(storage.values()) - storage["moments"]
    per_shard = storage["moments"] // num_shards(config)
    if storage["moments"] <= others or num_shards(config) == 1:
        return {}
    sequences = math.ceil(config.data.calibration_sequences / max(1, others // per_shard))
    shards = math.ceil(config.data.calibration_sequences / sequences)
    return {
        "storage_bytes.advice": f"moments are most of it; record.shard_sequences={sequences} makes {shards} shards "
        f"and {in_units(shards * per_shard)} of moments"
    }


def _memory(config: RunConfig, work: Workload, workers: int) -> dict[str, object]:
    """What every schedule needs, whether it fits, and which one ``record.schedule`` comes to."""
    available = memory.of_machine(config, workers)
    found: dict[str, object] = {"workers": workers, "memory.per_worker": in_units(available)}
    for kind in schedule.KINDS:
        layout = schedule.best_layout(kind, work, workers, available)
        found[f"memory.{kind}"] = "not with these workers"
        if layout is not None:
            total = schedule.peak(work, *layout).total
            fits = "fits" if total <= available else "does not fit"
            found[f"memory.{kind}"] = f"{in_units(total)}, {fits}: {schedule.in_words(kind, layout, workers)}"
    try:
        chosen = schedule.decide(work, workers, available, config.record.schedule)
    except ConfigError as error:
        return {**found, "schedule": f"none: {error}"}
    return {**found, "schedule": f"{chosen.kind}: {chosen.reason}"}


def _memory_to_evaluate(config: RunConfig, parameters: int, prunable: int, workers: int) -> str:
    """What one worker holds that measures losses: the whole model, and the maps of one that is pruned in memory."""
    copied = prunable if config.compare or config.prune.repair != "none" else 0
    size = (parameters + copied) * itemsize(config.model.dtype)
    fits = "fits" if size <= memory.of_machine(config, workers) else "does not fit"
    return f"{in_units(size)}, {fits}: a worker holds the whole model, at most one per device"


def _memory_to_repair(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any]) -> dict[str, object]:
    """What solving the widest site of a sequential repair takes, if all of its units stay."""
    if config.prune.repair != "sequential":
        return {}
    signals, outputs = widest_site(family, model_config, config.prune.parts), int(model_config["hidden_size"])
    return {"memory.repair": f"{in_units(solver_bytes(signals, outputs))}: one worker at a time solves a site"}


def _at_best(config: RunConfig, work: Workload, workers: int) -> float:
    """Seconds, if layers were as fast as products of large matrices."""
    forward, moments = flop(config, work)
    alone = forward / probe.flop_per_second(config.model.dtype) + moments / probe.flop_per_second("float32")
    return alone * _rounds_of_work(config, workers) / num_shards(config)


def _probed(config: RunConfig, work: Workload, workers: int, directory: Any) -> float:
    """Seconds, from the first and a middle layer; every worker loads every layer once."""
    first = probe.time_layer(config, work, directory, 0)
    middle = probe.time_layer(config, work, directory, work.layers // 2) if work.layers > 1 else first
    tokens = work.shard * work.length
    per_shard = sum(
        count * (time.token * tokens + time.shard) for count, time in ((1, first), (work.layers - 1, middle))
    )
    load = first.load + (work.layers - 1) * middle.load
    return config.prune.rounds * (per_shard * _rounds_of_work(config, workers) + load)


def _rounds_of_work(config: RunConfig, workers: int) -> int:
    """Shards one worker records, if as many as possible record at a time."""
    return math.ceil(num_shards(config) / workers)
