"""Floors, multiples and the even share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist.errors import PlanError
from cria_dist.maths.allocation import uniform_widths
from cria_dist.maths.allocation_rooms import Room, check_floors, even_widths, room


@pytest.mark.parametrize(
    ("width", "floor", "multiple", "widths"),
    [
        (48, 0.25, 16, (16, 32, 48)),
        (50, 0.25, 16, (16, 32, 48, 50)),
        (50, 0.5, 16, (32, 48, 50)),
        (48, 0.0, 16, (16, 32, 48)),
        (12, 0.25, 16, (12,)),
        (48, 1.0, 16, (48,)),
        (100, 0.07, 1, tuple(range(7, 101))),
    ],
)
def test_the_widths_of_a_room(width: int, floor: float, multiple: int, widths: tuple[int, ...]) -> None:
    assert room(width, floor, multiple, 3.0).widths == widths


@given(
    widths=st.dictionaries(st.sampled_from("abc"), st.integers(20, 4000), min_size=1),
    permille=st.integers(1, 900),
    multiple=st.sampled_from([1, 8, 16]),
)
@settings(deadline=None, max_examples=200)
def test_even_widths_are_the_uniform_ones(widths: dict[str, int], permille: int, multiple: int) -> None:
    rooms = {key: room(width, 0.01, multiple, 7.0) for key, width in widths.items()}
    budget = 7.0 * sum(widths.values()) * (1 - permille / 1000)
    try:
        expected = uniform_widths(widths, permille / 1000, multiple)
    except PlanError:
        return
    if all(one.smallest < one.width for one in rooms.values()):
        assert even_widths(rooms, budget) == expected


def test_even_widths_leave_the_protected_alone() -> None:
    rooms = {"a": Room(100, 100, 1, 1.0), "b": Room(100, 20, 1, 1.0), "c": Room(100, 20, 1, 1.0)}
    assert even_widths(rooms, 240) == {"a": 100, "b": 70, "c": 70}
    with pytest.raises(PlanError, match=r"leaves 100, but the least that must stay costs 140; lower prune\.ratio"):
        even_widths(rooms, 100)


def test_what_the_smallest_widths_keep_beyond_the_share_the_others_lose() -> None:
    """The smallest widths are shares of the dense ones; what a round before left may be nearly that already."""
    rooms = {"a": Room(40, 32, 8, 1.0), "b": Room(96, 24, 8, 1.0), "c": Room(64, 24, 8, 1.0)}
    assert even_widths(rooms, 112) == {"a": 32, "b": 48, "c": 32}  # a share of 0.56 would leave 22 units at a
    groups = {"a": Room(2, 1, 1, 50.0), "b": Room(4, 1, 1, 50.0), "c": Room(90, 20, 1, 1.0)}
    assert even_widths(groups, 150) == {"a": 1, "b": 1, "c": 50}  # a share of 0.38 would leave no group at a
    assert even_widths(groups, 120) == {"a": 1, "b": 1, "c": 20}


@given(
    sites=st.dictionaries(
        st.sampled_from("abcde"), st.tuples(st.integers(8, 400), st.floats(0.05, 0.9), st.sampled_from([1.0, 60.0]))
    ),
    multiple=st.sampled_from([1, 8]),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=200)
def test_even_widths_keep_floors_and_budget(
    sites: dict[str, tuple[int, float, float]], multiple: int, share: float
) -> None:
    rooms = {key: room(width, floor, multiple, cost) for key, (width, floor, cost) in sites.items()}
    dense, least = (sum(one.cost(getattr(one, of)) for one in rooms.values()) for of in ("width", "smallest"))
    budget = least + share * (dense - least)
    widths = even_widths(rooms, budget)
    assert all(widths[key] in one.widths for key, one in rooms.items())
    assert sum(rooms[key].cost(width) for key, width in widths.items()) <= budget * (1 + 1e-9)


def test_a_budget_below_the_floors_names_what_can_be_reached() -> None:
    rooms = {"a": Room(100, 25, 1, 2.0), "b": Room(100, 100, 1, 2.0)}
    check_floors(rooms, 250.0, 400.0, 0.375, {})
    with pytest.raises(
        PlanError, match=r"prune\.ratio=0\.4 cannot be reached: .* at most 0\.375 go; lower prune\.ratio"
    ):
        check_floors(rooms, 240.0, 400.0, 0.4, {})


def test_a_layer_that_may_go_costs_nothing_but_one_stays() -> None:
    """Layers of at least 5 + 25 and 9 + 10; of the second and a protected first at least 55 + 0."""
    rooms = {
        "a.block": Room(1, 0, 1, 5.0),
        "a.mlp": Room(50, 25, 1, 1.0),
        "b.block": Room(1, 0, 1, 9.0),
        "b.mlp": Room(50, 10, 1, 1.0),
    }
    inside = {"a.block": ["a.mlp"], "b.block": ["b.mlp"]}
    check_floors(rooms, 19.0, 114.0, 95 / 114, inside)
    with pytest.raises(PlanError, match=r"at most 0\.833 go"):
        check_floors(rooms, 18.0, 114.0, 96 / 114, inside)
    protected = rooms | {"a.block": Room(1, 1, 1, 5.0), "a.mlp": Room(50, 50, 1, 1.0)}
    check_floors(protected, 55.0, 114.0, 59 / 114, inside)
    with pytest.raises(PlanError, match=r"at most 0\.518 go"):
        check_floors(protected, 54.0, 114.0, 60 / 114, inside)


def test_a_measured_cost_lies_on_lines_and_never_stands_still() -> None:
    step = Room(64, 8, 8, 10 / 64, ((8, 0.0), (32, 4.0), (48, 4.0), (64, 10.0)))
    assert step.cost(64) == pytest.approx(10)
    assert step.cost(20) == pytest.approx(2, abs=0.02)
    costs = step.costs(np.arange(8.0, 65.0, 8.0))
    assert (np.diff(costs) > 0).all()
    assert costs[5] - costs[3] < 0.05  # 32 to 48: the plateau


def test_even_widths_keep_a_budget_of_measured_costs() -> None:
    rooms = {
        "a": Room(64, 8, 8, 10 / 64, ((8, 0.0), (32, 4.0), (48, 4.0), (64, 10.0))),
        "b": Room(64, 64, 8, 10 / 64, ((8, 0.0), (64, 10.0))),
        "c": Room(1, 0, 1, 2.0),
    }
    assert even_widths(rooms, 22.0) == {"a": 64, "b": 64, "c": 1}
    assert even_widths(rooms, 16.5) == {"a": 48, "b": 64, "c": 1}
    narrow = rooms | {"b": Room(64, 56, 8, 10 / 64, ((8, 0.0), (64, 10.0)))}
    assert even_widths(narrow, 15.0) == {"a": 48, "b": 56, "c": 1}
    with pytest.raises(PlanError, match="no even share"):
        even_widths(rooms, 11.0)
