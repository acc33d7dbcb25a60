"""The tensor schedule on Ray: two actors share every layer; what they record is what one process records."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from cria_dist.errors import WorkerError
from cria_dist.pipeline import Context
from cria_dist.pipeline.recording import record_model
from cria_dist.pool import LocalPool, Pool
from cria_dist.records import Site
from cria_dist.runtime.pool import RayPool
from cria_dist.store.recording import MANIFEST, Recording

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("session")]


@pytest.fixture
def pool() -> Iterator[RayPool]:
    made = RayPool(workers=2)
    yield made
    made.release()


@pytest.fixture
def run(
    run_config: Callable[..., Any], make_context: Callable[..., Context], tmp_path: Path
) -> Callable[..., tuple[Context, Recording]]:
    """``run(schedule, pool, shard_sequences, **changes)``: record into a folder of its own, or go on there."""

    def make(schedule: str, pool: Pool, shard_sequences: int, **changes: Any) -> tuple[Context, Recording]:
        settings = {"dtype": "float32", "schedule": schedule, "memory_gb": 1, "shard_sequences": shard_sequences}
        settings |= changes.pop("record", {})
        context = make_context(run_config(tmp_path / schedule, record=settings, **changes), pool)
        job = context.job
        folder = tmp_path / schedule / "recording"
        return context, record_model(context, "record", folder, job.model_dir, job.digests["model"])

    return make


def assert_equal(found: Recording, expected: Recording, sites: Iterable[Site]) -> None:
    assert found.is_complete()
    for site in sites:
        signals = expected.signals(site)
        assert sorted(found.signals(site)) == sorted(signals)
        for name, signal_NM in found.signals(site).items():
            assert np.abs(signal_NM - signals[name]).max() < 1e-6 * np.abs(signals[name]).max(), (site.key, name)
        ours, theirs = found.moments(site), expected.moments(site)
        assert ours.count == theirs.count
        for one, other in ((ours.total_N, theirs.total_N), (ours.gram_NN, theirs.gram_NN)):
            assert np.abs(one - other).max() < 1e-6 * np.abs(other).max(), site.key


def times(recording: Recording) -> dict[str, int]:
    """When each file of a recording was written."""
    folder = recording.storage.folder
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("shard-*")}


@pytest.mark.slow
@pytest.mark.soak
def test_two_ranks_equal_one_process_and_go_on_where_they_stopped(run: Callable[..., Any], pool: RayPool) -> None:
    _, alone = run("replicate", LocalPool(), 4)
    context, together = run("tensor", pool, 4)
    assert_equal(together, alone, context.job.widths)
    assert {len(commit["parts"]) for commits in together.manifest()["sites"].values() for commit in commits} == {2}

    before = times(together)
    together.storage.delete(MANIFEST)
    together.storage.delete("commits/layer-001.mlp/shard-00001.json")
    _, again = run("tensor", pool, 4)
    assert_equal(again, alone, context.job.widths)
    assert {name for name, at in times(again).items() if at != before[name]} == {
        name for name in before if "shard-00001" in name
    }


@pytest.mark.slow
@pytest.mark.soak
def test_a_killed_rank_is_survived(run: Callable[..., Any], pool: RayPool, tmp_path: Path) -> None:
    _, alone = run("replicate", LocalPool(), 1)
    folder = tmp_path / "tensor" / "recording" / "commits"
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_rank, args=(folder, killed))
    killer.start()
    context, together = run("tensor", pool, 1)
    killer.join()
    [committed] = killed
    assert 0 < committed < 2 * 12, "the recording was over before the rank was killed"
    assert_equal(together, alone, context.job.widths)


def kill_a_rank(commits: Path, killed: list[int]) -> None:
    """SIGKILL one of the two actors when the first commit is there; tells how many were."""
    deadline = time.monotonic() + 120
    while not (count := len(list(commits.glob("*/*.json")))):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    hosts = [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::_Host")]
    assert len(hosts) == 2
    os.kill(hosts[-1].pid, signal.SIGKILL)
    killed.append(count)


@pytest.mark.slow
@pytest.mark.soak
def test_what_only_one_rank_refuses_ends_the_run(
    run: Callable[..., Any], pool: RayPool, pico: Path, tmp_path: Path
) -> None:
    """Unit 40 of 48 overflows float16, which rank 1 sees; rank 0 waits for its facts and must not wait for ever."""
    model = Path(shutil.copytree(pico, tmp_path / "loud"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][40] *= 1e6
    tensors["model.layers.1.mlp.down_proj.weight"][:, 40] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkerError, match=r"layer-001.mlp, shard 0: \d+ values of signal '(up|output)' do not fit"):
        run("tensor", pool, 4, model={"path": str(model)}, record={"dtype": "float16"})
    assert not list(tmp_path.glob("tensor/recording/commits/layer-001*/*"))
