"""Workers of several processes: one process group, all-or-nothing, an error when they find no place."""

import functools
import os
import signal
import stat
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from cria_dist.errors import NumericError, WorkerError
from cria_dist.models import ranks
from cria_dist.pool import Flow
from cria_dist.runtime import pool as ray_pool
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.shape import Shape, needs_and_nodes
from tests.runtime.listening import listeners

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]

PAIR = Flow(ranks=2)
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CRIA_MEETING")


class Adder:
    """Sums (rank + 1) * item over the process group; rank 1 kills itself at chosen items, once each."""

    def __init__(self, folder: Path, deadly: tuple[int, ...] = ()) -> None:
        self._folder, self._deadly = folder, deadly
        self._rank = ranks.join(2).rank
        (folder / f"group-{os.getpid()}").write_text(os.environ["CRIA_MEETING"])

    def __call__(self, item: int) -> float:
        import torch

        mark = self._folder / f"died-{item}"
        if self._rank == 1 and item in self._deadly and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        value = torch.tensor([float((self._rank + 1) * item)])
        torch.distributed.all_reduce(value)
        return value.item()


class Leaving(Adder):
    """Parts from the other rank when its stage is over."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        weakref.finalize(self, ranks.leave)


def environment() -> Callable[[int], dict[str, str]]:
    return lambda item: {name: os.environ[name] for name in NAMES}


def stubborn_rank() -> Callable[[int], int]:
    def work(item: int) -> int:
        if os.environ["RANK"] == "1":
            raise NumericError(f"{item} values are NaN")
        time.sleep(60)  # as in a collective that the other never enters
        return item

    return work


def clumsy_rank() -> Callable[[int], int]:
    def work(item: int) -> int:
        if os.environ["RANK"] == "1":
            raise RuntimeError("connection closed by peer")
        return item

    return work


@pytest.fixture
def pool():
    made = RayPool(workers=2)
    yield made
    made.release()


def test_ranks_find_each_other_in_their_environment(pool: RayPool) -> None:
    [(_, found)] = pool.map(environment, [0], flow=PAIR)
    place = Path(found.pop("CRIA_MEETING").removeprefix("file://"))
    assert found == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_all_ranks_run_every_item_of_every_stage_and_open_no_port(pool: RayPool, tmp_path: Path) -> None:
    for stage, items in enumerate(([1, 2], [5])):
        folder = tmp_path / str(stage)
        folder.mkdir()
        found = dict(pool.map(functools.partial(Leaving, folder), items, flow=PAIR))
        assert found == {item: 3.0 * item for item in items}
        assert len(list(folder.glob("group-*"))) == 2
    assert {address for _, address in listeners()} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_dead_rank_ends_the_crew_and_the_item_is_done_by_a_new_one(pool: RayPool, tmp_path: Path) -> None:
    make = functools.partial(Adder, tmp_path, (2, 4))
    assert dict(pool.map(make, [1, 2, 3, 4, 5], flow=PAIR)) == {item: 3.0 * item for item in range(1, 6)}
    assert len(list(tmp_path.glob("died-*"))) == 2
    groups = [path.read_text() for path in tmp_path.glob("group-*")]
    assert len(groups) == 6  # three crews of two
    assert len(set(groups)) == 3  # each with a meeting place of its own


def test_an_error_of_ours_on_any_rank_is_the_items_error_at_once(pool: RayPool) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"^3: 3 values are NaN$"):
        dict(pool.map(stubborn_rank, [3], flow=PAIR))
    assert time.monotonic() - started < 45


def test_another_error_on_one_rank_is_a_loss(pool: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cria_dist.runtime.backlog.MAX_ATTEMPTS", 2)
    with pytest.raises(WorkerError, match=r"^7: lost 2 times, last by: connection closed by peer"):
        dict(pool.map(clumsy_rank, [7], flow=PAIR))


def test_single_workers_follow_crews_and_their_place_is_given_back(pool: RayPool, tmp_path: Path) -> None:
    dict(pool.map(functools.partial(Adder, tmp_path), [1], flow=PAIR))
    assert len(dict(pool.map(lambda: lambda item: item, [1, 2, 3]))) == 3
    states = [group["state"] for group in placement_group_table().values()]
    assert set(states) <= {"REMOVED"}
    pool.release()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] >= 2


def test_a_crew_that_fits_no_node_is_an_error_with_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "START_SECONDS", 2.0)
    pool = RayPool(workers=4)
    cpus = int(ray.cluster_resources()["CPU"])
    with pytest.raises(WorkerError, match=r"none started in 2 s; a worker needs 4 x 1 CPU on one node; the nodes have"):
        dict(pool.map(environment, [0], flow=Flow(ranks=4)))
    assert needs_and_nodes(Shape(4, 0.5)).startswith("a worker needs 4 x 0.5 CPU, 0.5 GPU on one node; the nodes have")
    assert f"{cpus} CPU" in needs_and_nodes(Shape(4, 0.0))
    pool.release()
