"""Recording beside the forward pass it rides on, memory, two actors, a simulated cluster, growth."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from jobs.benchmarks import record_actors, record_growth, record_overhead, record_scaling, record_store
from jobs.benchmarks.frame import RESULTS, Measurement

Samples = dict[str, dict[str, list[float]]]
Part = Callable[[Path, bool], tuple[dict[str, float], Samples]]

NO_GPU = "gpu_overhead_ratio: not measured, PyTorch finds no CUDA device here."


def measure(quick: bool) -> Measurement:
    """Measure every quantity, one after the other, in a scratch folder on the disk of the results."""
    parts: list[tuple[Part, tuple[str, ...]]] = [
        (record_overhead.on_cpu, record_overhead.PROTOCOL),
        (lambda _, quick: _write_path(quick), record_store.PROTOCOL),
        (record_growth.memory, record_growth.MEMORY_PROTOCOL),
        (record_actors.two_actors, record_actors.PROTOCOL),
        (lambda _, quick: record_scaling.scaling(quick), record_scaling.PROTOCOL),
        (record_growth.slopes, record_growth.SLOPES_PROTOCOL),
    ]
    protocol: list[str] = []
    if torch.cuda.is_available():
        parts.append((record_overhead.on_gpu, record_overhead.GPU_PROTOCOL))
    else:
        protocol.append(NO_GPU)
    metrics: dict[str, float] = {}
    samples: Samples = {}
    for part, sentences in parts:
        found, taken = _in_scratch(part, quick)
        metrics |= found
        samples |= taken
        protocol += sentences
    return Measurement("record", tuple(protocol), metrics, samples, {name: _unit(name) for name in samples})


def _write_path(quick: bool) -> tuple[dict[str, float], Samples]:
    found = record_store.write_ratio(quick)
    return dict(found.metrics), {f"write path, {case}": speeds for case, speeds in found.samples.items()}


def _in_scratch(part: Part, quick: bool) -> tuple[dict[str, float], Samples]:
    RESULTS.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="record-", dir=RESULTS)).absolute()
    try:
        return part(folder, quick)
    finally:
        shutil.rmtree(folder)


def _unit(quantity: str) -> str:
    units = {"peak memory": "MiB", "efficiency": "", "coordinator": "ms", "write path": "MB/s"}
    return next((unit for start, unit in units.items() if quantity.startswith(start)), "s")
