"""Widths from measured losses: how much every site hurts at a few widths, then the best choice under a budget.

Shapes: C measured widths of a site.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from cria_dist.maths.allocation_rooms import Room
from cria_dist.maths.knapsack import Menu, choose
from cria_dist.records import Float64

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of a site that its curve is measured at; whatever the budget, so that budgets share the curves."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The model's loss with one site pruned to several widths.

    Attributes:
        widths_C: units left, ascending; the last is the whole site.
        losses_C: loss of the model.
    """

    widths_C: Float64
    losses_C: Float64

    def increase_at(self, widths: Float64) -> Float64:
        """Increase of the loss over that of the whole site, between the measurements by a monotone cubic.

        A narrower site that measures better than a wider one is noise: it counts as equal.
        """
        increase_C = self.losses_C - self.losses_C[-1]
        envelope_C = np.maximum.accumulate(increase_C[::-1])[::-1]
        if self.widths_C.size == 1:
            return np.zeros_like(widths)
        return np.asarray(PchipInterpolator(self.widths_C, envelope_C)(widths), dtype=np.float64)


def measured_widths(one: Room) -> tuple[int, ...]:
    """Widths of a site to measure the loss at, ascending: its smallest, and the first from each of ``SHARES`` on."""
    smaller = one.widths[:-1]
    nearest = [[width for width in smaller if width >= share * one.width] for share in SHARES]
    return tuple(sorted({*smaller[:1], *(widths[0] for widths in nearest if widths)}))


def sensitivity_widths(curves: Mapping[str, Curve], rooms: Mapping[str, Room], budget: float) -> dict[str, int]:
    """The widths whose losses add up to the least increase within the budget.

    Args:
        curves: measured losses of every site that has room.
        rooms: what each site may become.
        budget: cost that may stay at all sites together.

    Returns:
        New width per site; less than one step of one site is left of the budget.

    Raises:
        PlanError: the floors keep more than the budget allows.
    """
    keys = sorted(rooms)
    menus = [_menu(curves.get(key), rooms[key]) for key in keys]
    chosen = choose(menus, budget)
    return {key: rooms[key].widths[index] for key, index in zip(keys, chosen, strict=True)}


def _menu(curve: Curve | None, one: Room) -> Menu:
    widths = np.asarray(one.widths, dtype=np.float64)
    losses = np.zeros_like(widths) if curve is None else curve.increase_at(widths)
    return Menu(one.costs(widths), losses)
