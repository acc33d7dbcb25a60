"""Widths from scores: the budget is hit, floors hold, smaller budgets are nested, noise gives even widths."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cria_dist.errors import PlanError
from cria_dist.maths.allocation_rooms import Room, room
from cria_dist.maths.allocation_scores import global_widths, shares


def test_shares_by_hand() -> None:
    np.testing.assert_array_equal(shares(np.array([1.0, 3.0, 4.0])), [0.125, 0.375, 0.5])
    np.testing.assert_array_equal(shares(np.array([-np.inf, 1.0, 3.0])), [0, 0.25, 0.75])
    np.testing.assert_array_equal(shares(np.array([-1.0, 0.0, 2.0])), [0, 0.25, 0.75])
    np.testing.assert_array_equal(shares(np.array([-np.inf, -np.inf])), [0, 0])
    np.testing.assert_array_equal(shares(np.zeros(3)), [0, 0, 0])


def test_the_site_with_useless_units_loses_them() -> None:
    keep = {"a": np.array([1.0, 1, 1, 1, 1, 1]), "b": np.array([9.0, 9, 9, 0.1, 0.1, 0.1])}
    rooms = {key: Room(6, 1, 1, 1.0) for key in keep}
    assert global_widths(keep, rooms, 9) == {"a": 6, "b": 3}
    scaled = {"a": keep["a"] * 1e6, "b": keep["b"] * 1e-6}
    assert global_widths(scaled, rooms, 9) == {"a": 6, "b": 3}, "the unit of a site's scores matters"
    assert global_widths(keep, {**rooms, "b": Room(6, 4, 1, 1.0)}, 9) == {"a": 5, "b": 4}


def test_what_costs_more_goes_first_at_equal_scores() -> None:
    keep = {"a": np.ones(4), "b": np.ones(4)}
    assert global_widths(keep, {"a": Room(4, 1, 1, 1.0), "b": Room(4, 1, 1, 5.0)}, 14) == {"a": 4, "b": 2}


@pytest.mark.parametrize("score", [0.0, 2.5])
def test_scores_that_say_nothing_give_even_widths(score: float) -> None:
    keep = {key: np.full(40, score) for key in "abcd"}
    rooms = {key: room(40, 0.25, 4, 3.0) for key in keep}
    assert global_widths(keep, rooms, 3.0 * 112) == dict.fromkeys("abcd", 28)
    assert global_widths(keep, rooms, 3.0 * 120) == {"a": 28, "b": 28, "c": 32, "d": 32}


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, Room]]:
    keep, rooms = {}, {}
    multiple = draw(st.sampled_from([1, 4, 8]))
    for key in draw(st.sampled_from(["a", "ab", "abc"])):
        width = draw(st.integers(8, 60))
        seed = draw(st.integers(0, 10_000))
        keep[key] = np.random.default_rng(seed).gamma(0.3, size=width).round(3)
        floor = draw(st.sampled_from([0.0, 0.25, 0.6, 1.0]))
        rooms[key] = room(width, floor, multiple, float(draw(st.sampled_from([1, 3, 10]))))
    return keep, rooms


def cost(rooms: dict[str, Room], widths: dict[str, int]) -> float:
    return sum(widths[key] * one.unit_cost for key, one in rooms.items())


@given(problem=problems(), share=st.floats(0.05, 0.99), less=st.floats(0.5, 1))
@settings(deadline=None, max_examples=300)
def test_budget_floors_and_nesting(
    problem: tuple[dict[str, np.ndarray], dict[str, Room]], share: float, less: float
) -> None:
    keep, rooms = problem
    dense = cost(rooms, {key: one.width for key, one in rooms.items()})
    least = cost(rooms, {key: one.smallest for key, one in rooms.items()})
    if least > share * dense * (1 + 1e-6):
        with pytest.raises(PlanError, match="the floors keep"):
            global_widths(keep, rooms, share * dense)
        return
    widths = global_widths(keep, rooms, share * dense)
    assert all(widths[key] in one.widths for key, one in rooms.items())
    largest_step = max(one.unit_cost * one.multiple for one in rooms.values())
    assert share * dense - largest_step < cost(rooms, widths) <= share * dense * (1 + 1e-9)
    assume(least <= share * less * dense)
    narrower = global_widths(keep, rooms, share * less * dense)
    assert all(narrower[key] <= widths[key] for key in rooms)


def test_comparable_scores_are_ranked_as_they_are():
    """One threshold over all sites: where the gates have receded nearly all units go, and few where they are needed."""
    rng = np.random.default_rng(0)
    keep = {"a": rng.uniform(0.005, 0.02, 64), "b": rng.uniform(0.45, 0.9, 64)}
    rooms = {key: room(64, 0.1, 8, 1.0) for key in keep}
    assert global_widths(keep, rooms, 128 * 0.6, comparable=True) == {"a": 8, "b": 64}
    assert global_widths(keep, rooms, 128 * 0.6) == {"a": 32, "b": 40}


def test_a_site_of_equal_scores_never_regrows():
    """Means of 46 and of 48 equal shares differ in the last digit."""
    keep = {key: np.full(238, 0.3) for key in "ab"}
    rooms = {key: room(238, 0.0, 48, 1.0) for key in keep}
    widths = global_widths(keep, rooms, 2 * 238 * 0.8)
    assert widths == {"a": 144, "b": 192}
