"""Two recorder actors on two cores beside one actor on one core, through the pool of a run."""

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from cria_dist.config_file import parse
from cria_dist.models.blocks import partition
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.session import ray_session
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from jobs.benchmarks.frame import alternate
from jobs.benchmarks.record_setup import Load, Shape, discard, make_task, save_model

Samples = dict[str, dict[str, list[float]]]

PROTOCOL = (
    "two_actor_speedup: seconds from the first shard's start to the last one's end (random Llama of 8 layers, hidden "
    "576, 1536 neurons), one Ray actor against two, each pinned to a core of its own; models loaded and one shard "
    "recorded before.",
)
SHAPE = Shape(layers=8, hidden=576, neurons=1536)
LOAD = Load(shards=16, sequences=4, batch=4, length=512, sampled=64)
QUICK_LOAD = Load(shards=4, sequences=2, batch=2, length=128, sampled=16)
Span = tuple[float, float]


def two_actors(folder: Path, quick: bool) -> tuple[dict[str, float], Samples]:
    """Speed-up of two actors over one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two_actor_speedup needs two cores")
    load = QUICK_LOAD if quick else LOAD
    directory = save_model(folder / "model", SHAPE)
    task = make_task(folder / "actors", directory, load)
    config = parse({"model": {"path": str(directory)}, "recover": {"steps": 0}, "run": {"workers": 2}})
    with ray_session(config):
        contenders: dict[str, Callable[[], float]] = {
            "1 actor": lambda: _record(folder, task, load.shards, cores[:1]),
            "2 actors": lambda: _record(folder, task, load.shards, cores[:2]),
        }
        found = alternate(contenders, 1 if quick else 3, warm_up=0)
    speedup = statistics.median(found["1 actor"]) / statistics.median(found["2 actors"])
    return {"two_actor_speedup": speedup}, {f"recording {load.shards} shards": found}


def _record(folder: Path, task: RecordTask, shards: int, cores: list[int]) -> float:
    (block,) = partition(SHAPE.layers, 1)
    gate = folder / f"gate-{time.monotonic_ns()}"
    gate.mkdir()
    pool = RayPool(len(cores))
    try:
        make = functools.partial(_PinnedRecorder, task, gate, cores)
        spans = [span for _, span in pool.map(make, [ShardWork(shard, block) for shard in range(shards)])]
    finally:
        pool.release()
    discard(task)
    return max(ended for _, ended in spans) - min(began for began, _ in spans)


class _PinnedRecorder:
    """Takes a free core, records a shard to warm up, waits until all the others have, then works."""

    def __init__(self, task: RecordTask, gate: Path, cores: list[int]) -> None:
        self._number = _take_number(gate, len(cores))
        os.sched_setaffinity(0, {cores[self._number]})
        self._recorder = Recorder(task)
        self._gate, self._workers = gate, len(cores)
        self._is_warm = False

    def __call__(self, work: ShardWork) -> Span:
        if not self._is_warm:
            self._recorder(ShardWork(self._number, work.block))
            (self._gate / f"ready-{self._number}").touch()
            while len(list(self._gate.glob("ready-*"))) < self._workers:
                time.sleep(0.005)
            self._is_warm = True
        began = time.monotonic()
        self._recorder(work)
        return began, time.monotonic()


def _take_number(gate: Path, workers: int) -> int:
    for number in range(workers):
        try:
            (gate / f"taken-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise RuntimeError(f"more than {workers} workers at {gate}")
