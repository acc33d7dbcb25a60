"""How recording grows: memory with the number of shards, time with tokens, neurons and layers."""

import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from cria_dist.models.blocks import partition
from cria_dist.models.checkpoint import read_config
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from jobs.benchmarks.frame import alternate, seconds
from jobs.benchmarks.memory import own_peak_bytes
from jobs.benchmarks.record_setup import Load, Shape, discard, make_task, one_thread, save_model

Samples = dict[str, dict[str, list[float]]]

MEMORY_PROTOCOL = (
    "rss_growth_8x: peak resident memory of a recorder process (random Llama of 8 layers, hidden 256, 1024 neurons) "
    "over 16 shards against 2 shards of the same size; a process each, so that only what grows with tokens can differ.",
)
SLOPES_PROTOCOL = (
    "slope_tokens, slope_neurons, slope_layers: exponents of a shard's seconds, moments and files included, between "
    "the smallest and the largest size; all else at 4 layers, hidden 256, 1024 neurons, 1024 tokens; one thread.",
)
MEMORY_SHAPE = Shape(layers=8, hidden=256, neurons=1024)
MEMORY_LOAD = Load(shards=2, sequences=8, batch=4, length=256, sampled=64)
BASE_SHAPE = Shape(layers=4, hidden=256, neurons=1024)
BASE_LOAD = Load(shards=1, sequences=4, batch=4, length=256, sampled=64)
TOKENS, NEURONS, LAYERS = (4, 8, 16, 32), (512, 1024, 2048, 4096), (2, 4, 8, 16)


def memory(folder: Path, quick: bool) -> tuple[dict[str, float], Samples]:
    """Peak memory of 2 and of 16 shards, and their ratio."""
    load = replace(MEMORY_LOAD, length=64, sampled=16) if quick else MEMORY_LOAD
    directory = save_model(folder / "model", MEMORY_SHAPE)
    few = make_task(folder / "few", directory, load)
    many = make_task(folder / "many", directory, replace(load, shards=8 * load.shards))
    contenders: dict[str, Callable[[], float]] = {
        "2 shards": lambda: _peak_mib(few),
        "16 shards": lambda: _peak_mib(many),
    }
    found = alternate(contenders, 1 if quick else 3, warm_up=0)
    growth = statistics.median(found["16 shards"]) / statistics.median(found["2 shards"])
    return {"rss_growth_8x": growth}, {"peak memory of a recorder": found}


def slopes(folder: Path, quick: bool) -> tuple[dict[str, float], Samples]:
    """Seconds of a shard against tokens, neurons and layers."""
    cut, repeats = (2, 1) if quick else (4, 3)
    axes: dict[str, dict[int, tuple[Shape, Load]]] = {
        "tokens": {size * BASE_LOAD.length: (BASE_SHAPE, replace(BASE_LOAD, sequences=size)) for size in TOKENS[:cut]},
        "neurons": {size: (replace(BASE_SHAPE, neurons=size), BASE_LOAD) for size in NEURONS[:cut]},
        "layers": {size: (replace(BASE_SHAPE, layers=size), BASE_LOAD) for size in LAYERS[:cut]},
    }
    metrics: dict[str, float] = {}
    samples: Samples = {}
    for axis, sizes in axes.items():
        contenders = {f"{size} {axis}": _recording(folder / f"{axis}-{size}", *sizes[size]) for size in sizes}
        with one_thread():
            found = samples[f"a shard, against {axis}"] = alternate(contenders, repeats)
        first, last = (statistics.median(values) for values in (*found.values(),)[:: len(found) - 1])
        metrics[f"slope_{axis}"] = math.log(last / first) / math.log(max(sizes) / min(sizes))
    return metrics, samples


def _recording(folder: Path, shape: Shape, load: Load) -> Callable[[], float]:
    task = make_task(folder, save_model(folder / "model", shape), load)
    recorder, (block,) = Recorder(task), partition(shape.layers, 1)
    return lambda: seconds(lambda: recorder(ShardWork(0, block)))


def _peak_mib(task: RecordTask) -> float:
    """Record in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        peak = process.submit(_record_all, task).result()
    discard(task)
    return peak


def _record_all(task: RecordTask) -> float:
    """Peak MiB of this process after recording every shard."""
    recorder, (block,) = Recorder(task), partition(int(read_config(task.model_dir)["num_hidden_layers"]), 1)
    sequences = len(np.load(task.tokens_path, mmap_mode="r"))
    with one_thread():
        for shard in range(sequences // task.shard_sequences):
            recorder(ShardWork(shard, block))
    return own_peak_bytes() / 2**20
