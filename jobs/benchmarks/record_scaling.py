"""The coordinator alone: a stub that sleeps a fixed time per shard, on a simulated cluster of fake GPUs."""

import logging
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from cria_dist.pool import Flow
from cria_dist.runtime.pool import RayPool
from jobs.benchmarks.frame import RESULTS

__all__ = ["PROTOCOL", "scaling"]

PROTOCOL = (
    "Simulated cluster: ray.cluster_utils.Cluster, 4 nodes of 8 fake GPUs, all its processes on this machine; a worker "
    "is one actor with one fake GPU that sleeps a fixed time per shard and writes a file of 1 KiB.",
    "sim_efficiency_W: shards x seconds per shard / W over the time from when all W workers are up to the last result.",
    "coordinator_ms: time per shard when a shard costs nothing, with the workers on the coordinator's cores; "
    "coordinator_cpu_ms: CPU time of its process alone; saturation_actors: shard seconds over coordinator_ms.",
)
NODES, GPUS_PER_NODE = 4, 8
OBJECT_STORE_BYTES = 80 << 20
Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, slots=True, order=True)
class Phase:
    """Shards of one cost.

    Attributes:
        seconds: sleep per shard.
        per_worker: shards per worker.
    """

    seconds: float
    per_worker: int


FREE = Phase(0.0, 50)
FULL = ((1, 2, 4, 8, 16, 32), (FREE, Phase(0.25, 12), Phase(1.0, 4)), 3)
QUICK = ((1, 8, 32), (FREE, Phase(0.25, 6)), 1)


Shard = tuple[int, str, int]
"""(phase, kind, number): a plain tuple, for the class would be imported in every worker, and torch with it. Kind is
``shard``, or ``start`` where the workers of a phase wait for each other."""


def scaling(quick: bool) -> tuple[dict[str, float], Samples]:
    """Run the stub on 1 to 32 workers, all counts in turn, ``repeats`` times; writes a plot below ``runs/bench``.

    Returns:
        Metrics (``sim_efficiency_32`` is at the shortest shards that cost anything) and samples per quantity and
        number of actors: efficiency, and the coordinator's milliseconds per shard.
    """
    counts, phases, repeats = QUICK if quick else FULL
    samples: Samples = {}
    with _cluster():
        for _ in range(repeats):
            for workers in counts:
                taken = _run(workers, phases)
                for phase, (seconds, cpu_seconds) in zip(phases, taken, strict=True):
                    for name, value in _quantities(phase, workers, seconds, cpu_seconds).items():
                        samples.setdefault(name, {}).setdefault(f"{workers} actors", []).append(value)
    metrics = _metrics(counts, phases, samples)
    _plot(counts, phases, samples, metrics)
    return metrics, samples


def _quantities(phase: Phase, workers: int, seconds: float, cpu_seconds: float) -> dict[str, float]:
    if phase is not FREE:
        return {_efficiency(phase): phase.per_worker * phase.seconds / seconds}
    shards = phase.per_worker * workers
    return {"coordinator": 1000 * seconds / shards, "coordinator, CPU": 1000 * cpu_seconds / shards}


def _efficiency(phase: Phase) -> str:
    return f"efficiency, {phase.seconds:g} s a shard"


def _metrics(counts: tuple[int, ...], phases: tuple[Phase, ...], samples: Samples) -> dict[str, float]:
    def median(quantity: str, workers: int) -> float:
        return statistics.median(samples[quantity][f"{workers} actors"])

    costly = [phase for phase in phases if phase is not FREE]
    overhead = median("coordinator", counts[-1])
    metrics = {"coordinator_ms": overhead, "coordinator_cpu_ms": median("coordinator, CPU", counts[-1])}
    for phase in costly:
        metrics[f"sim_efficiency_{counts[-1]}_at_{phase.seconds:g}s"] = median(_efficiency(phase), counts[-1])
        metrics[f"saturation_actors_at_{phase.seconds:g}s"] = phase.seconds * 1000 / overhead
    return {f"sim_efficiency_{workers}": median(_efficiency(costly[0]), workers) for workers in counts} | metrics


def _run(workers: int, phases: tuple[Phase, ...]) -> list[tuple[float, float]]:
    """Seconds of every phase, from when all fresh workers are up to its last shard: (wall, CPU of this process)."""
    items: list[Shard] = []
    after: dict[Shard, tuple[Shard, ...]] = {}
    homes: dict[Shard, int] = {}
    for index, phase in enumerate(phases):
        starts = [(index, "start", number) for number in range(workers)]
        shards = [(index, "shard", number) for number in range(phase.per_worker * workers)]
        homes |= {start: start[2] for start in starts}
        if index:  # or a worker would wait for the next phase before this one has begun
            after |= dict.fromkeys(starts, ((index - 1, "start", 0),))
        after |= dict.fromkeys(shards, (starts[0],))
        items += starts + shards
    began: dict[int, tuple[float, float]] = {}
    ended: dict[int, tuple[float, float]] = {}
    pool = RayPool(workers, gpus_per_worker=1.0)
    with tempfile.TemporaryDirectory() as folder:
        for (phase, kind, _), _ in pool.map(_stub(Path(folder), workers, phases), items, flow=Flow(after, homes)):
            ended[phase] = time.perf_counter(), time.process_time()
            if kind == "start":
                began.setdefault(phase, ended[phase])
    pool.release()
    return [(ended[phase][0] - began[phase][0], ended[phase][1] - began[phase][1]) for phase in range(len(phases))]


def _stub(folder: Path, workers: int, phases: tuple[Phase, ...]) -> Callable[[], Callable[[Shard], int]]:
    """What makes the worker; plain values only, so that its process imports neither this file nor torch."""
    costs = [phase.seconds for phase in phases]
    name = str(folder)

    def make() -> Callable[[Shard], int]:
        import pathlib
        import time

        def work(shard: Shard) -> int:
            phase, kind, number = shard
            place = pathlib.Path(name)
            if kind == "start":
                (place / f"start-{phase}-{number}").touch()
                while len(list(place.glob(f"start-{phase}-*"))) < workers:
                    time.sleep(0.02)
                return 0
            time.sleep(costs[phase])
            return (place / f"shard-{phase}-{number}").write_bytes(bytes(1024))

        return work

    return make


@contextmanager
def _cluster() -> Generator[None]:
    # not above: Ray must be imported after cria_dist.runtime, which sets its authentication mode
    import ray
    from ray.cluster_utils import Cluster

    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=GPUS_PER_NODE, num_gpus=GPUS_PER_NODE, object_store_memory=OBJECT_STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def _plot(counts: tuple[int, ...], phases: tuple[Phase, ...], samples: Samples, metrics: Mapping[str, float]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(counts, counts, color="0.7", label="ideal")
    for phase in phases:
        if phase is not FREE:
            values = samples[_efficiency(phase)]
            speedup = [workers * statistics.median(values[f"{workers} actors"]) for workers in counts]
            limit = metrics[f"saturation_actors_at_{phase.seconds:g}s"]
            axes.plot(counts, speedup, marker="o", label=f"{phase.seconds:g} s a shard, saturates near {limit:.0f}")
    axes.set(xscale="log", yscale="log", xlabel="recorder actors", ylabel="speed-up over one actor's ideal")
    axes.set_xticks(counts, [str(workers) for workers in counts])
    axes.set_yticks(counts, [str(workers) for workers in counts])
    axes.minorticks_off()
    axes.set_title(f"Coordinator: {metrics['coordinator_ms']:.2f} ms per shard", loc="left")
    axes.legend(frameon=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "record_scaling.png", dpi=150)
