"""What a run is given before it starts: room for its training workers, one thread for its sums."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.runtime import launch, train
from cria_dist.runtime.pool import RayPool


def test_sums_in_this_process_are_those_of_a_worker(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of products in NumPy and SciPy, too: workers have one thread each."""

    def threads(*_: object) -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    monkeypatch.setattr(launch, "prune", threads)
    with threadpool_limits(2, "blas"):
        assert threads() == {2}
        assert launch.run(run_config(tmp_path, run={"pool": "local"}))[1] == {1}


def test_a_recovery_without_room_is_refused_before_anything_is_recorded(
    run_config: Callable[..., RunConfig], pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with one GPU, and the two training workers that are the default."""

    @contextmanager
    def session(_: RunConfig) -> Generator[int]:
        yield 1

    monkeypatch.setattr(launch, "ray_session", session)
    monkeypatch.setattr(launch, "gpus_per_worker", lambda _: 1.0)
    monkeypatch.setattr(launch, "check_shared", lambda *_: None)
    monkeypatch.setattr(train.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8, "GPU": 1}}])
    reached = list[str]()
    monkeypatch.setattr(launch, "prune", lambda _context, _command, until: reached.append(until))
    config = run_config(
        tmp_path, model={"path": str(pico)}, recover={"steps": 8, "workers": 2}, run={"pool": "ray", "workers": 1}
    )
    with pytest.raises(ConfigError, match=r"recover\.workers=2 but the cluster has 1 GPUs; lower recover\.workers"):
        launch.run(config)
    launch.run(config, "apply")
    assert reached == ["apply"]


@pytest.mark.parametrize(("gpus", "waits"), [(1, True), (None, False)])
def test_a_cluster_that_grows_is_waited_for(
    gpus: int | None,
    waits: bool,
    run_config: Callable[..., RunConfig],
    pico: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def session(_: RunConfig) -> Generator[int]:
        yield 1

    monkeypatch.setattr(launch, "ray_session", session)
    monkeypatch.setattr(launch, "gpus_per_worker", lambda _: 1.0)
    monkeypatch.setattr(launch, "check_shared", lambda *_: None)
    monkeypatch.setattr(launch, "prune", lambda context, *_: context.pool)
    run = {"pool": "ray", "workers": 1, "gpus_per_worker": gpus}
    pool = launch.run(run_config(tmp_path, model={"path": str(pico)}, run=run), "apply")[1]
    assert isinstance(pool, RayPool)
    assert pool._waits == waits
