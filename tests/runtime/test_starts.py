"""Workers that do not start: how long a pool waits for them, why it gives up. No Ray runs here."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.errors import WorkerError
from cria_dist.pool import Flow
from cria_dist.runtime import crew as ray_crew
from cria_dist.runtime import pool as ray_pool
from cria_dist.runtime.backlog import Backlog
from cria_dist.runtime.crew import Crew
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.shape import Shape
from cria_dist.runtime.sweep import Share

MISSING = RuntimeError(
    "The actor died because of an error raised in its creation task, ray\n  File\nModuleNotFoundError: x"
)


def crew(ready: bool = False, seconds: float = 0.0) -> Crew[Any]:
    """One that is ready, or has been trying to start for so long."""
    made = Crew[Any](Shape(1, 0.0))
    made.is_ready, made._since = ready, time.monotonic() - seconds
    return made


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "needs_and_nodes", lambda _: "a worker needs 1 CPU")
    monkeypatch.setattr(ray_crew, "_start", lambda *_: pytest.fail("a worker was started"))


def test_workers_that_may_still_come_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One was never placed, another died and is being replaced, the third has nothing left to do at home."""
    backlog, pool = Backlog(["a", "b", "c"], Flow(homes={"a": 0, "b": 1, "c": 2}), 3), RayPool(3)
    crews, taken = [crew(ready=True), crew(seconds=400), crew(seconds=5)], list[str]()
    monkeypatch.setattr(Crew, "begin", lambda _: None)
    monkeypatch.setattr(Crew, "start", lambda _, stage, made_by, item: taken.append(item))
    for _ in range(3):
        pool._hand_out(crews, backlog, None)
        pool._check_starts(crews)
    assert taken == ["a", "b"], "c is at home on the one that is coming"
    with pytest.raises(WorkerError, match=r"^workers: none started in 300 s; a worker needs 1 CPU$"):
        pool._check_starts([crew(seconds=400), crew(seconds=301)])


def test_a_cluster_that_grows_is_waited_for_as_long_as_training_does(caplog: pytest.LogCaptureFixture) -> None:
    pool = RayPool(2, 1.0, waits=True)
    with caplog.at_level(logging.WARNING):
        for seconds in (59, 61, 62, 125, 1700, 5, 59, 61):
            pool._check_starts([crew(seconds=seconds), crew(seconds=seconds)])
        pool._check_starts([crew(seconds=1900), crew(ready=True)])
    told = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert told == [f"no worker has started in {seconds} s" for seconds in (61, 125, 1700, 61)]
    assert "waiting for at most 1800 s; a worker needs 1 CPU" in caplog.text
    with pytest.raises(WorkerError, match="none started in 1800 s"):
        pool._check_starts([crew(seconds=1801), crew(seconds=1802)])


def test_a_worker_that_dies_at_its_start_is_started_later_each_time_and_named(caplog: pytest.LogCaptureFixture) -> None:
    pool, one = RayPool(2), crew(seconds=10)
    for deaths in range(1, 6):
        assert not one.is_missing(300)
        pool._check_starts([one])
        one = one.replaced(MISSING)
        assert one._due - time.monotonic() == pytest.approx(0.5 * 2**deaths, abs=0.2)
        one.begin()  # not yet
    assert "died before it was ready (ModuleNotFoundError: x), starting another in 1.0 s" in caplog.text
    pool._check_starts([one, crew(seconds=10)])
    with pytest.raises(
        WorkerError, match=r"died 5 times before it was ready, last by: ModuleNotFoundError: x; has every"
    ):
        pool._check_starts([one])


def test_one_that_was_ready_is_replaced_at_once() -> None:
    fresh = crew(ready=True, seconds=1000).replaced(RuntimeError("its node died"))
    assert fresh.deaths == 0
    assert fresh._due <= time.monotonic()
    assert fresh.seconds_without_a_process < 100


def test_pools_that_work_at_the_same_time_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "NodeManagerAddress": address, "Resources": {"CPU": cpus} if cpus else {}}
        for address, cpus in (("10.0.0.1", 0.0), ("10.0.0.2", 4.0), ("10.0.0.2", 4.0), ("10.0.0.3", 2.0))
    ]
    nodes.append({"Alive": False, "NodeManagerAddress": "10.0.0.4", "Resources": {"CPU": 64.0}})
    monkeypatch.setattr("cria_dist.runtime.shape.ray.nodes", lambda: nodes)
    assert RayPool(2).per_machine == 2
    assert RayPool(2, together=6).per_machine == 6
    assert RayPool(2, together=16).per_machine == 8, "the machine with most CPUs holds 8"
    assert RayPool(2, together=0).per_machine == 8
    monkeypatch.setattr("cria_dist.runtime.shape.ray.nodes", list)
    assert RayPool(2).per_machine == 1


@pytest.mark.parametrize(("asked", "per_machine"), [(6, 6), (0, 8)])
def test_trials_at_the_same_time_share_a_machine(
    asked: int, per_machine: int, run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cria_dist.runtime.pool.cpus_of_a_machine", lambda: 8)
    config = run_config(tmp_path, run={"pool": "ray", "workers": asked, "gpus_per_worker": 1})
    sweep: Any = SimpleNamespace(base=config, race=lambda _: None)
    trial: Any = SimpleNamespace(config=config, folder=tmp_path / "run")
    with Share(sweep, 2, 1.0).context(trial, "analyse") as context:
        assert context.pool.per_machine == per_machine
        assert context.pool.workers == 2
        assert context.pool._waits
