"""How many workers a run has, and on what: what it wants, or what the cluster holds when it starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from cria_dist import machine
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.runtime import session


@pytest.mark.parametrize(
    ("cluster", "run", "expected"),
    [
        ({"CPU": 4.0}, {}, (4, 0.0)),
        ({"CPU": 4.0, "GPU": 2.0}, {}, (2, 1.0)),
        ({"CPU": 4.0, "GPU": 2.0}, {"workers": 3}, (3, 1.0)),
        ({"CPU": 4.0, "GPU": 2.0}, {"gpus_per_worker": 0.5}, (4, 0.5)),
        ({"CPU": 4.0, "GPU": 2.0}, {"gpus_per_worker": 0}, (4, 0.0)),
        ({"CPU": 1.0}, {"gpus_per_worker": 1, "workers": 8}, (8, 1.0)),
        ({}, {"gpus_per_worker": 1, "workers": 8}, (8, 1.0)),
    ],
)
def test_what_the_run_wants_comes_before_what_is_there(
    cluster: dict[str, float],
    run: dict[str, Any],
    expected: tuple[int, float],
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: cluster)
    config = run_config(tmp_path, run=run)
    assert (session._workers(config), session.gpus_per_worker(config)) == expected
    assert config.result_part() == run_config(tmp_path).result_part()


@pytest.mark.parametrize(("gpus", "hidden"), [(0, True), (None, False), (1, False)])
def test_workers_without_a_gpu_see_none(
    gpus: int | None, hidden: bool, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Ray itself hides GPUs only from those who have some."""
    environment = session.worker_environment(run_config(tmp_path, run={"gpus_per_worker": gpus}))
    assert environment.get("CUDA_VISIBLE_DEVICES") == ("" if hidden else None)
    assert environment.items() >= session.WORKER_ENVIRONMENT.items()


@pytest.mark.parametrize(
    ("cluster", "run", "message"),
    [
        ({"CPU": 4.0}, {"gpus_per_worker": 1}, r"has no GPU yet; set run.workers to how many workers it may grow to"),
        ({}, {"workers": 2}, r"has no CPU to run workers on"),
    ],
)
def test_a_cluster_of_unknown_size(
    cluster: dict[str, float],
    run: dict[str, Any],
    message: str,
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: cluster)
    with pytest.raises(ConfigError, match=message):
        session._workers(run_config(tmp_path, run=run))


def test_a_teacher_with_gpus_of_its_own_wants_some(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, recover={"distill": 0.5, "teacher_gpus": 2})
    for cluster, gpus in (({"CPU": 4.0, "GPU": 1.0}, 1.0), ({"CPU": 4.0}, None)):
        monkeypatch.setattr(session.ray, "cluster_resources", lambda cluster=cluster: cluster)
        if gpus:
            assert session.gpus_per_worker(config) == gpus
            continue
        with pytest.raises(ConfigError, match=r"recover\.teacher_gpus=2 and the Ray cluster has no GPU; set it to 0"):
            session.gpus_per_worker(config)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            AuthenticationError("no token was found"),
            r"^no token for the Ray cluster at '10\.0\.0\.1:6379', or not its own; ",
        ),
        (
            ConnectionError("Failed to connect"),
            r"^no Ray cluster at .*\(Failed to connect\); start one or leave run\.address",
        ),
    ],
)
def test_a_cluster_that_lets_nobody_in(
    error: Exception,
    message: str,
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray says the first of a missing token, and no more than the second of a wrong one."""

    def refused(**_: object) -> None:
        raise error

    monkeypatch.setattr(session.ray, "init", refused)
    config = run_config(tmp_path, run={"address": "10.0.0.1:6379"})
    with pytest.raises(ConfigError, match=message) as caught, session.ray_session(config):
        pass
    assert "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token" in str(caught.value)
    assert "RAY_AUTH_MODE=disabled" in str(caught.value)


def test_a_private_cluster_has_the_cpus_of_this_process_and_room_for_what_is_asked_for(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[int]()
    monkeypatch.setattr(machine, "cpus", lambda: 3)
    monkeypatch.setattr(session, "_provide_token", lambda: None)
    monkeypatch.setattr(session.ray, "init", lambda num_cpus, **_: started.append(num_cpus))
    for workers, training in ((0, 1), (5, 1), (2, 4)):
        session._start_private(
            run_config(tmp_path, run={"workers": workers}, recover={"steps": 8, "workers": training})
        )
    assert started == [3, 5, 4]
