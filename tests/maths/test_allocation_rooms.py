"""Floors, multiples and the even share."""

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
