"""The Ray pool: the same results as in this process, lost workers, failing items."""

import functools
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from cria_dist.errors import NumericError, WorkerError
from cria_dist.pool import Flow, LocalPool
from cria_dist.runtime import backlog
from cria_dist.runtime import pool as ray_pool
from cria_dist.runtime.pool import RayPool
from tests.runtime.listening import listeners

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]


def squarer() -> Callable[[int], int]:
    return lambda item: item * item


def process_ids() -> Callable[[int], int]:
    def work(item: int) -> int:
        del item
        time.sleep(0.2)
        return os.getpid()

    return work


def dies_once(folder: Path, item: int) -> int:
    """Kill the worker's process on the first attempt at every third item."""
    mark = folder / str(item)
    if item % 3 == 0 and not mark.exists():
        mark.touch()
        os._exit(1)
    return -item


def dies_always(item: int) -> int:
    if item == 2:
        os._exit(1)
    return item


def refuses(item: int) -> int:
    if item == 2:
        raise NumericError("3 values are NaN")
    return item


def leaves_a_mark(folder: Path, item: str) -> bool:
    """Whether the item before was finished, for an item ``NAME-NUMBER``; the first of each is slow."""
    name, number = item.split("-")
    before = number == "0" or (folder / f"{name}-{int(number) - 1}").exists()
    time.sleep(0.5 if number == "0" else 0.0)
    (folder / item).touch()
    return before


def slow_or_failing(item: int) -> int:
    if item == 1:
        raise NumericError("1 value is NaN")
    time.sleep(2.0)
    return item


@pytest.fixture
def pool():
    made = RayPool(workers=2)
    yield made
    made.release()


def test_same_results_as_in_this_process(pool: RayPool) -> None:
    items = list(range(20))
    assert dict(pool.map(squarer, items)) == dict(LocalPool().map(squarer, items))


def test_work_is_spread_over_processes_that_are_kept(pool: RayPool) -> None:
    first = {result for _, result in pool.map(process_ids, range(6))}
    second = {result for _, result in pool.map(process_ids, range(6))}
    assert len(first) == 2
    assert first == second
    assert os.getpid() not in first


def test_one_worker_when_asked(pool: RayPool) -> None:
    assert len({result for _, result in pool.map(process_ids, range(4), workers=1)}) == 1


def test_no_items_no_workers(pool: RayPool) -> None:
    assert list(pool.map(squarer, [])) == []


def test_items_of_dead_workers_are_done_again(pool: RayPool, tmp_path: Path) -> None:
    make = functools.partial(functools.partial, dies_once, tmp_path)
    assert dict(pool.map(make, list(range(9)))) == {item: -item for item in range(9)}
    assert len(list(tmp_path.iterdir())) == 3


def test_an_item_that_kills_every_worker_is_named(pool: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "MAX_ATTEMPTS", 2)
    with pytest.raises(WorkerError, match=r"^2: lost 2 times"):
        dict(pool.map(lambda: dies_always, [1, 2, 3]))


def test_an_error_names_the_item_and_keeps_its_message(pool: RayPool) -> None:
    with pytest.raises(WorkerError) as caught:
        dict(pool.map(lambda: refuses, [1, 2, 3]))
    assert str(caught.value) == "2: 3 values are NaN"


def test_an_item_starts_when_the_one_before_it_is_finished(pool: RayPool, tmp_path: Path) -> None:
    items = ["a-0", "b-0", "a-1", "b-1", "a-2", "b-2"]
    after = {"a-1": ["a-0"], "b-1": ["b-0"], "a-2": ["a-1", "b-1"], "b-2": ["b-1"]}
    make = functools.partial(functools.partial, leaves_a_mark, tmp_path)
    assert dict(pool.map(make, items, flow=Flow(after=after))) == dict.fromkeys(items, True)


def test_items_stay_with_their_worker(pool: RayPool) -> None:
    homes = {item: item % 2 for item in range(8)}
    where = dict(pool.map(process_ids, list(homes), flow=Flow(homes=homes)))
    assert {where[item] for item in (0, 2, 4, 6)}.isdisjoint({where[item] for item in (1, 3, 5, 7)})
    assert len(set(where.values())) == 2


def test_an_error_leaves_nothing_behind_for_the_next_stage(pool: RayPool) -> None:
    dict(pool.map(squarer, [1, 2]))
    with pytest.raises(WorkerError, match="1 value is NaN"):
        dict(pool.map(lambda: slow_or_failing, [0, 1]))
    assert dict(pool.map(squarer, [1, 2, 3, 4])) == {1: 1, 2: 4, 3: 9, 4: 16}


def test_workers_that_find_no_place_leave_their_items_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "START_SECONDS", 20.0)  # a busy machine needs 5 to start one that has a place
    places = int(ray.cluster_resources()["CPU"])
    pool = RayPool(workers=places + 1)
    homes = {item: item % (places + 1) for item in range(3 * (places + 1))}
    assert dict(pool.map(squarer, list(homes), flow=Flow(homes=homes))) == {item: item * item for item in homes}
    pool.release()


def test_release_frees_the_processors(pool: RayPool) -> None:
    dict(pool.map(squarer, [1, 2]))
    pool.release()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] >= 2


def test_the_cluster_is_private() -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    dashboard = ray.worker._global_node.address_info["webui_url"]
    assert dashboard.startswith("127.0.0.1:")


def test_nothing_of_it_listens_beyond_loopback(pool: RayPool) -> None:
    assert dict(pool.map(squarer, [1])) == {1: 1}
    found = listeners()
    names = {name.split(".")[0] for name, _ in found}
    assert names >= {"gcs_server", "raylet", "ray::DashboardAgent", "ray::_Host"}
    assert {address for _, address in found} == {"127.0.0.1"}
