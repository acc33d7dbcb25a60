"""Recordings on Ray through every schedule and every kind of death: the manifest is that of a quiet run."""

import functools
import gc
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block
from cria_dist.pipeline import Context, prune
from cria_dist.pool import LocalPool, Pool
from cria_dist.report.progress import Progress
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages.footprint import Workload
from cria_dist.stages.prepare import prepare
from cria_dist.stages.record import Recorder, RecordTask

pytestmark = pytest.mark.ray

KILLS = 20
COMMITS_PER_KILL = 8  # two items of four sites
START = "import sys; from cria_dist.cli import main; sys.exit(main(sys.argv[1:], until='record'))"


@pytest.fixture(scope="module")
def deep(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that there are blocks."""
    return make_model(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=4)


def record(config: RunConfig, pool: Pool) -> Path:
    """Record; returns the round folder."""
    job = prepare(config)
    try:
        prune(Context(job, pool, RayTrainer(1, use_gpu=False), Progress(job.folder)), until="record")
    finally:
        pool.release()
    return job.folder / "round-00"


def half_model_gb(config: RunConfig) -> float:
    """Memory that two of the four layers just fit into."""
    model_config = checkpoint.read_config(Path(config.model.path))
    blocks = (Block(0, 2, 4), Block(2, 4, 4))
    return 1.01e-9 * max(Workload(config, model_config).footprint(block).total for block in blocks)


class Chaos(threading.Thread):
    """Kills a recorder of this process's own cluster at a random time after every few commits.

    Without progress there is no further kill: whoever kills faster than any item can be done ends the run by the cap.

    Args:
        commits: folder whose files are counted.
        seed: of the times and the victims.
    """

    def __init__(self, commits: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.kills = 0
        self._commits, self._random = commits, random.Random(seed)
        self._over = threading.Event()

    def run(self) -> None:
        seen = 0
        while self.kills < KILLS and not self._over.wait(0.005):
            committed = sum(1 for _ in self._commits.rglob("*.json"))
            if committed >= seen + COMMITS_PER_KILL and (victims := self._victims()):
                self._over.wait(self._random.uniform(0, 0.1))
                self._random.choice(victims).kill()
                self.kills += 1
                seen = committed

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _victims(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[0].startswith("ray::_Host.run"):
                    found.append(process)
            except (psutil.NoSuchProcess, IndexError):
                continue  # ended while we looked, or not yet named
        return found


class DiesAfterwards:
    """A recorder whose process dies when an item is done and before it can say so, once per item."""

    def __init__(self, task: RecordTask) -> None:
        self._recorder = Recorder(task)
        self._marks = task.tokens_path.parent

    def __call__(self, work: Any) -> Any:
        done = self._recorder(work)
        mark = self._marks / f"died-{work.shard}-{work.block.first}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return done


class Spoiling(RayPool):
    """Puts a :class:`DiesAfterwards` in place of every recorder."""

    def map(self, make_worker: Any, items: Any, workers: Any = None, flow: Any = None) -> Iterator[Any]:
        if isinstance(make_worker, functools.partial) and make_worker.func is Recorder:
            make_worker = functools.partial(DiesAfterwards, make_worker.args[0])
        return super().map(make_worker, items, workers, flow)


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("kind", ["pipeline", pytest.param("sweep", marks=pytest.mark.soak)])
def test_every_schedule_gives_the_manifest_of_replicate(
    run_config: Callable[..., RunConfig], deep: Path, tmp_path: Path, kind: str
) -> None:
    config = run_config(tmp_path / "one", model={"path": str(deep)}, record={"schedule": "replicate"})
    clean = record(config, LocalPool())
    ours = record(
        run_config(
            tmp_path / "two",
            model={"path": str(deep)},
            record={"schedule": kind, "memory_gb": half_model_gb(config)},
        ),
        RayPool(2),
    )
    assert (ours / "manifest.json").read_bytes() == (clean / "manifest.json").read_bytes()
    assert not list((ours / "boundaries").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("session")
@pytest.mark.soak
def test_workers_that_die_after_their_work_and_before_their_answer(
    run_config: Callable[..., RunConfig], deep: Path, tmp_path: Path
) -> None:
    config = run_config(tmp_path / "one", model={"path": str(deep)})
    clean = record(config, LocalPool())
    sweep = {"schedule": "sweep", "memory_gb": half_model_gb(config)}
    ours = record(run_config(tmp_path / "two", model={"path": str(deep)}, record=sweep), Spoiling(2))
    assert len(list(ours.parent.rglob("died-*"))) == 6
    assert (ours / "manifest.json").read_bytes() == (clean / "manifest.json").read_bytes()


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("session")
def test_twenty_kills_at_random_points_change_nothing(
    run_config: Callable[..., RunConfig], deep: Path, tmp_path: Path
) -> None:
    """Of a sweep, where an item also needs what another left."""
    many: dict[str, Any] = {"model": {"path": str(deep)}, "data": {"calibration_sequences": 72}}
    config = run_config(tmp_path / "one", **many, record={"shard_sequences": 1})
    clean = record(config, LocalPool())
    sweep = {"shard_sequences": 1, "schedule": "sweep", "memory_gb": half_model_gb(config)}
    config = run_config(tmp_path / "two", **many, record=sweep)
    chaos = Chaos(prepare(config).folder / "round-00" / "commits", seed=20)
    chaos.start()
    ours = record(config, RayPool(2))
    chaos.stop()
    assert chaos.kills >= KILLS
    assert (ours / "manifest.json").read_bytes() == (clean / "manifest.json").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("victim", ["node", pytest.param("driver", marks=pytest.mark.soak)])
def test_a_lost_node_and_a_killed_driver(
    run_config: Callable[..., RunConfig],
    run_tree: dict[str, Any],
    write_toml: Callable[[Path, dict[str, Any]], Path],
    deep: Path,
    tmp_path: Path,
    victim: str,
) -> None:
    many: dict[str, Any] = {"model": {"path": str(deep)}, "data": {"calibration_sequences": 72}}
    config = run_config(tmp_path / "one", **many, record={"shard_sequences": 1})
    clean = record(config, LocalPool())
    sweep = {"shard_sequences": 1, "schedule": "sweep", "memory_gb": half_model_gb(config)}
    config = run_config(tmp_path / "two", **many, record=sweep, run={"pool": "ray", "workers": 3})
    with several_nodes() as (cluster, nodes):
        tree = config.model_dump(mode="json", include={"name", "model", "data", "record", "recover", "evaluate"})
        tree = without_none(tree | {"run": {"root": config.run.root, "workers": 3, "address": cluster.address}})
        path = write_toml(tmp_path / "run.toml", tree)
        driver = start(path)
        wait_for(Path(config.run.root), 40, driver)
        if victim == "driver":
            driver.kill()
            driver.wait()
            assert not list(Path(config.run.root).rglob("manifest.json"))
            driver = start(path)
        else:
            cluster.remove_node(nodes[-1], allow_graceful=False)
        output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    [manifest] = Path(config.run.root).rglob("manifest.json")
    assert manifest.read_bytes() == (clean / "manifest.json").read_bytes()


@contextmanager
def several_nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without CPUs and three nodes of one CPU, in processes of their own; this process does not join."""
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    size = {"object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size})
    try:
        yield cluster, [cluster.add_node(num_cpus=1, **size) for _ in range(3)]
    finally:
        cluster.shutdown()
        gc.collect()  # Ray leaves a socket open; the test ignores the warning, the next one would not


def without_none(tree: Any) -> Any:
    """TOML has no word for None."""
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return tree


def start(config: Path) -> subprocess.Popen[str]:
    """The command of a user."""
    return subprocess.Popen(
        [sys.executable, "-c", START, str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(root: Path, count: int, driver: subprocess.Popen[str]) -> None:
    """Until so many (site, shard) pairs are committed below a folder of runs."""
    deadline = time.monotonic() + 240
    while sum(1 for _ in root.glob("*/round-00/commits/*/*.json")) < count:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
