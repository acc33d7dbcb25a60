"""Whole layers and the units inside them from one budget, against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist.errors import PlanError
from cria_dist.maths.allocation_curves import Curve
from cria_dist.maths.allocation_mixed import mixed_widths
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
    return [first | second for first, second in itertools.product(*per_layer)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_nothing_within_the_budget_is_better(seed, share):
    curves, rooms = problem(seed)
    budget = share * 2 * 235
    found = mixed_widths(curves, rooms, budget, INSIDE)
    assert found in everything(rooms)
    assert cost_of(found, rooms) <= budget + 1e-6
    best = min(loss_of(one, curves) for one in everything(rooms) if cost_of(one, rooms) <= budget + 1e-6)
    assert loss_of(found, curves) == pytest.approx(best, abs=1e-9)


def test_a_protected_layer_stays():
    curves, rooms = problem(0)
    for key in ("a.block", "a.heads", "a.mlp"):
        rooms[key] = Room(rooms[key].width, rooms[key].width, rooms[key].multiple, rooms[key].unit_cost)
    found = mixed_widths(curves, rooms, 240, INSIDE)
    assert found == {"a.block": 1, "a.heads": 3, "a.mlp": 8, "b.block": 0, "b.heads": 0, "b.mlp": 0}
    with pytest.raises(PlanError, match="least that must stay"):
        mixed_widths(curves, rooms, 200, INSIDE)
