"""What recording and a sequential repair have to compute, and how long they take."""

import math
from pathlib import Path

import torch

from cria_dist import machine
from cria_dist.config import RunConfig
from cria_dist.stages import probe
from cria_dist.stages.footprint import Workload, num_shards


def times(config: RunConfig, work: Workload, workers: int, probed: Path | None) -> dict[str, object]:
    """Operations and seconds, as plain data for display.

    Args:
        config: the run.
        work: model and recording, in numbers.
        workers: how many record.
        probed: checkpoint of which a part is recorded to take the time; None to take it from matrix products.
    """
    forward, moments = flop(config, work)
    repair = repair_flop(config, work)
    seconds = _at_best(config, work, workers) if probed is None else _probed(config, work, workers, probed)
    basis = "matrix products, hence at best" if probed is None else "one batch through the first and a middle layer"
    what = "record and sequential repair" if repair else "record"
    return {
        "forward_flop": forward,
        "moments_flop": moments,
        "repair_flop": repair,
        "seconds": round(seconds, 1),
        "seconds.repair": round(seconds * repair / (forward + moments), 1),
        "seconds.basis": f"{what} only, not scores, evaluation or recovery; {workers} workers as fast as this process; "
        f"{basis}",
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
    return config.run.workers or torch.cuda.device_count() or machine.cpus()


def _at_best(config: RunConfig, work: Workload, workers: int) -> float:
    """Seconds, if layers were as fast as products of large matrices."""
    forward, moments = flop(config, work)
    alone = forward / probe.flop_per_second(config.model.dtype) + moments / probe.flop_per_second("float32")
    return alone * _rounds_of_work(config, workers) / num_shards(config)


def _probed(config: RunConfig, work: Workload, workers: int, directory: Path) -> float:
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
