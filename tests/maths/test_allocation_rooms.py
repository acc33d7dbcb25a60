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
    with pytest.raises(PlanError, match=r"leaves no unit at b; lower prune\.ratio"):
        even_widths(rooms, 100)


def test_a_budget_below_the_floors_names_what_can_be_reached() -> None:
    rooms = {"a": Room(100, 25, 1, 2.0), "b": Room(100, 100, 1, 2.0)}
    check_floors(rooms, 250.0, 400.0, 0.375)
    with pytest.raises(
        PlanError, match=r"prune\.ratio=0\.4 cannot be reached: .* at most 0\.375 go; lower prune\.ratio"
    ):
        check_floors(rooms, 240.0, 400.0, 0.4)


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
    with pytest.raises(PlanError, match="no even share"):
        even_widths(rooms, 11.0)
