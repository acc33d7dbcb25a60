"""Widths from measured losses."""

import numpy as np
import pytest

from cria_dist.errors import PlanError
from cria_dist.maths.allocation_curves import Curve, measured_widths, sensitivity_widths
from cria_dist.maths.allocation_rooms import Room, room


def curve(widths: list[int], losses: list[float]) -> Curve:
    return Curve(np.array(widths, dtype=np.float64), np.array(losses, dtype=np.float64))


def test_widths_to_measure() -> None:
    assert measured_widths(room(64, 0.25, 8, 1.0)) == (16, 24, 32, 40, 48, 56)
    assert measured_widths(room(64, 0.0, 4, 1.0)) == (4, 8, 16, 24, 32, 40, 48, 56)
    assert measured_widths(room(172, 0.3, 8, 1.0)) == (56, 72, 88, 112, 136, 152)
    assert measured_widths(room(172, 0.3, 128, 1.0)) == (128,)
    assert measured_widths(Room(48, 48, 8, 1.0)) == ()


def test_between_the_measurements_the_curve_is_monotone_and_noise_is_flattened() -> None:
    one = curve([16, 32, 48, 64], [5.0, 3.0, 3.2, 3.0])
    widths = np.arange(16.0, 65.0)
    increase = one.increase_at(widths)
    assert (np.diff(increase) <= 1e-12).all()
    np.testing.assert_allclose(one.increase_at(np.array([16.0, 32.0, 48.0, 64.0])), [2.0, 0.2, 0.2, 0.0])


def test_the_flat_site_pays() -> None:
    rooms = {key: room(64, 0.25, 8, 3.0) for key in "ab"}
    curves = {
        "a": curve([16, 32, 48, 64], [2.4, 2.2, 2.1, 2.0]),
        "b": curve([16, 32, 48, 64], [9.0, 6.0, 3.0, 2.0]),
    }
    assert sensitivity_widths(curves, rooms, 3.0 * 96) == {"a": 32, "b": 64}
    assert sensitivity_widths(curves, rooms, 3.0 * 80) == {"a": 16, "b": 64}
    assert sensitivity_widths(curves, {**rooms, "a": Room(64, 64, 8, 3.0)}, 3.0 * 96) == {"a": 64, "b": 32}


@pytest.mark.parametrize("permille", [350, 500, 700, 801, 999])
def test_the_budget_is_hit_within_one_multiple(permille: int) -> None:
    rng = np.random.default_rng(permille)
    rooms = {f"s{index}": room(200, 0.25, 8, cost) for index, cost in enumerate([3.0, 3.0, 5.0, 8.0])}
    curves: dict[str, Curve] = {}
    for key, one in rooms.items():
        widths = [*measured_widths(one), 200]
        curves[key] = curve(widths, [2 + rng.uniform(0, 2) * (1 - w / 200) ** 2 + rng.normal(0, 0.01) for w in widths])
    budget = sum(200 * one.unit_cost for one in rooms.values()) * permille / 1000
    widths = sensitivity_widths(curves, rooms, budget)
    spent = sum(widths[key] * one.unit_cost for key, one in rooms.items())
    steps = [8 * one.unit_cost for key, one in rooms.items() if widths[key] < 200]
    assert budget - min(steps) < spent <= budget


def test_a_budget_below_the_floors_is_refused() -> None:
    with pytest.raises(PlanError, match="lower prune"):
        sensitivity_widths({}, {"a": Room(64, 64, 8, 1.0)}, 60.0)
