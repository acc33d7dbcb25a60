"""Whole layers and the units inside them from one budget, against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist.errors import PlanError
from cria_dist.maths.allocation_curves import Curve
from cria_dist.maths.allocation_mixed import alike_widths, mixed_widths
from cria_dist.maths.allocation_rooms import Room

INSIDE = {"a.block": ["a.heads", "a.mlp"], "b.block": ["b.heads", "b.mlp"]}


def problem(seed):
    """Two layers with heads (3, each 50), neurons (8 in steps of 2, each 10) and a rest of 5; random losses."""
    rng = np.random.default_rng(seed)
    rooms, curves = {}, {}
    for whole, (heads, neurons) in INSIDE.items():
        rooms |= {whole: Room(1, 0, 1, 5), heads: Room(3, 1, 1, 50), neurons: Room(8, 2, 2, 10)}
        for key, points in ((whole, [0, 1]), (heads, [1, 2, 3]), (neurons, [2, 4, 6, 8])):
            losses = np.sort(rng.random(len(points)))[::-1] * (3 if key == whole else 1)
            losses[-1] = 0
            curves[key] = Curve(np.array(points, dtype=float), losses + 2.0)
    return curves, rooms


def cost_of(widths, rooms):
    return sum(width * rooms[key].unit_cost for key, width in widths.items())


def loss_of(widths, curves):
    """A layer that goes costs its own loss, whatever is inside."""
    return sum(
        sum(float(curves[key].increase_at(np.array([float(widths[key])]))[0]) for key in inside)
        if widths[whole]
        else float(curves[whole].increase_at(np.zeros(1))[0])
        for whole, inside in INSIDE.items()
    )


def everything(rooms):
    per_layer = []
    for whole, (heads, neurons) in INSIDE.items():
        choices = [{whole: 1, heads: h, neurons: n} for h in rooms[heads].widths for n in rooms[neurons].widths]
        per_layer.append([*choices, {whole: 0, heads: 0, neurons: 0}])
    both = [first | second for first, second in itertools.product(*per_layer)]
    return [one for one in both if any(one[whole] for whole in INSIDE)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(75 / 470, 1.0))
def test_nothing_within_the_budget_is_better(seed, share):
    curves, rooms = problem(seed)
    budget = share * 2 * 235
    found = mixed_widths(curves, rooms, budget, INSIDE)
    assert found in everything(rooms)
    assert cost_of(found, rooms) <= budget + 1e-6
    best = min(loss_of(one, curves) for one in everything(rooms) if cost_of(one, rooms) <= budget + 1e-6)
    assert loss_of(found, curves) == pytest.approx(best, abs=1e-9)


def test_not_every_layer_goes_though_none_is_missed():
    curves, rooms = problem(0)
    for whole in INSIDE:
        curves[whole] = Curve(np.array([0.0, 1.0]), np.array([2.0, 2.0]))
    found = mixed_widths(curves, rooms, 235, INSIDE)
    assert any(found[whole] for whole in INSIDE)
    assert 0 <= 235 - cost_of(found, rooms) < 20, "nothing says which of them to miss least: the budget alone decides"
    with pytest.raises(PlanError):
        mixed_widths(curves, rooms, 74, INSIDE)


def test_a_protected_layer_stays():
    curves, rooms = problem(0)
    for key in ("a.block", "a.heads", "a.mlp"):
        rooms[key] = Room(rooms[key].width, rooms[key].width, rooms[key].multiple, rooms[key].unit_cost)
    found = mixed_widths(curves, rooms, 240, INSIDE)
    assert found == {"a.block": 1, "a.heads": 3, "a.mlp": 8, "b.block": 0, "b.heads": 0, "b.mlp": 0}
    with pytest.raises(PlanError, match="least that must stay"):
        mixed_widths(curves, rooms, 200, INSIDE)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.3, 1.0))
def test_nothing_with_as_many_units_in_every_layer_is_better(seed, share):
    """The neurons stand for experts: layers that stay have the same number; else the budget cannot be kept at all."""
    curves, rooms = problem(seed)
    budget, alike = share * 2 * 235, [inside[1] for inside in INSIDE.values()]
    found = alike_widths(lambda given: mixed_widths(curves, given, budget, INSIDE, True), curves, rooms, alike, INSIDE)
    possible = [one for one in everything(rooms) if len({one[key] for key in alike} - {0}) <= 1]
    assert found in possible
    assert cost_of(found, rooms) <= budget + 1e-6
    best = min(loss_of(one, curves) for one in possible if cost_of(one, rooms) <= budget + 1e-6)
    assert loss_of(found, curves) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("spent", [False, True])
def test_what_costs_nothing_goes_no_further_than_asked(spent):
    curves, rooms = problem(0)
    flat = {key: Curve(one.widths_C, np.full_like(one.losses_C, 2.0)) for key, one in curves.items()}
    curves = {key: curves[key] if key in INSIDE else one for key, one in flat.items()}
    found = mixed_widths(curves, rooms, 320, INSIDE, spent)
    assert (320 - cost_of(found, rooms) < 20) == spent
    assert found in everything(rooms)


def test_as_many_in_every_layer_and_none_fits():
    curves, rooms = problem(0)
    rooms = {key: Room(one.width, max(1, one.smallest), one.multiple, one.unit_cost) for key, one in rooms.items()}
    with pytest.raises(PlanError, match="least that must stay"):
        alike_widths(lambda given: mixed_widths(curves, given, 100, INSIDE), curves, rooms, ["a.mlp", "b.mlp"], INSIDE)


def test_a_layer_that_is_too_dear_alone_is_not_the_one_that_stays():
    """Where no layer is missed, each is tried as the one that stays; the first costs 75 at the least, the second 30."""
    curves, rooms = problem(0)
    for whole in INSIDE:
        curves[whole] = Curve(np.array([0.0, 1.0]), np.array([2.0, 2.0]))
    rooms["b.heads"] = Room(3, 1, 1, 5)
    found = mixed_widths(curves, rooms, 40, INSIDE)
    assert found == {"a.block": 0, "a.heads": 0, "a.mlp": 0, "b.block": 1, "b.heads": 3, "b.mlp": 2}
