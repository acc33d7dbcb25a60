"""The order in which items are handed out: dependencies, homes, back-off, the cap on losses."""

import pytest

from cria_dist.errors import WorkerError
from cria_dist.pool import Flow
from cria_dist.runtime import backlog
from cria_dist.runtime.backlog import Backlog


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_items_come_in_their_order() -> None:
    left = Backlog([3, 1, 2], Flow(), workers=2)
    assert [left.take(worker) for worker in (0, 1, 0, 1)] == [3, 1, 2, None]


def test_an_item_waits_until_the_one_before_it_is_finished() -> None:
    left = Backlog(["a0", "b0", "a1", "b1"], Flow(after={"a1": ["a0"], "b1": ["b0"]}), workers=2)
    assert (left.take(0), left.take(1), left.take(0)) == ("a0", "b0", None)
    left.finish("b0")
    assert left.take(1) == "b1"
    left.finish("a0")
    assert left.take(1) == "a1"
    assert left.unfinished == 2


def test_an_item_waits_for_all_that_are_before_it() -> None:
    left = Backlog(["a", "b", "sum"], Flow(after={"sum": ["a", "b", "gone"]}), workers=3)
    assert (left.take(0), left.take(1), left.take(2)) == ("a", "b", None)
    left.finish("b")
    assert left.take(2) is None
    left.finish("a")
    assert left.take(2) == "sum"


def test_a_dependency_that_is_not_to_be_done_is_done() -> None:
    assert Backlog(["a1"], Flow(after={"a1": ["a0"]}), workers=1).take(0) == "a1"


def test_items_stay_at_home_and_fewer_workers_share_the_homes() -> None:
    items = ["x0", "x1", "x2"]
    flow = Flow(homes={"x0": 0, "x1": 1, "x2": 2})
    three = Backlog(items, flow, workers=3)
    assert [three.take(2), three.take(2), three.take(0), three.take(1)] == ["x2", None, "x0", "x1"]
    two = Backlog(items, flow, workers=2)
    assert [two.take(1), two.take(1), two.take(0), two.take(0)] == ["x1", None, "x0", "x2"]


def test_homes_that_are_left_are_numbered_anew() -> None:
    left = Backlog(["x1", "x3"], Flow(homes={"x1": 1, "x3": 3}), workers=2)
    assert (left.take(0), left.take(1)) == ("x1", "x3")


def test_the_items_of_an_absent_worker_go_to_others() -> None:
    left = Backlog(["x0", "x1"], Flow(homes={"x0": 0, "x1": 1}), workers=2)
    assert [left.take(0), left.take(0), left.take(0, absent={1})] == ["x0", None, "x1"]


def test_a_lost_item_comes_back_later_each_time() -> None:
    clock = Clock()
    left = Backlog([1], Flow(), workers=1, clock=clock)
    for delay in (1.0, 2.0, 4.0, 8.0):
        assert left.take(0) == 1
        left.lose(1, RuntimeError("gone"))
        clock.now += delay - 0.01
        assert left.take(0) is None
        clock.now += 0.02


def test_a_lost_item_lets_others_pass_and_then_keeps_its_place() -> None:
    clock = Clock()
    left = Backlog([1, 2, 3], Flow(), workers=1, clock=clock)
    left.take(0)
    left.lose(1, RuntimeError("gone"))
    assert left.take(0) == 2
    clock.now += 1.01
    assert (left.take(0), left.take(0)) == (1, 3)


def test_homes_do_not_change_the_order() -> None:
    left = Backlog(["free0", "home1", "free2"], Flow(homes={"home1": 0}), workers=1)
    assert [left.take(0) for _ in range(3)] == ["free0", "home1", "free2"]


def test_the_back_off_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "MAX_ATTEMPTS", 99)
    clock = Clock()
    left = Backlog([1], Flow(), workers=1, clock=clock)
    for _ in range(40):
        clock.now += 60.0
        assert left.take(0) == 1
        left.lose(1, RuntimeError("gone"))


def test_an_item_lost_too_often_is_named() -> None:
    clock = Clock()
    left = Backlog(["shard 7"], Flow(), workers=1, clock=clock)
    for _ in range(backlog.MAX_ATTEMPTS - 1):
        clock.now += 60.0
        left.take(0)
        left.lose("shard 7", RuntimeError("busy"))
    with pytest.raises(WorkerError, match=r"^shard 7: lost 5 times, last by: gone; is there enough memory\?$"):
        left.lose("shard 7", RuntimeError("gone\nand more"))


def test_depth_counts_what_no_worker_has_in_hand() -> None:
    left = Backlog([1, 2, 3], Flow(after={3: [1]}), workers=1)
    left.take(0)
    assert (left.waiting, left.unfinished) == (2, 3)
    left.lose(1, RuntimeError("gone"))
    assert (left.waiting, left.unfinished) == (3, 3)
