"""Widths of units inside layers and whole layers from one budget: a layer is narrowed, or it goes with all it has.

Shapes: C ways to have a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cria_dist.maths.allocation_curves import Curve
from cria_dist.maths.allocation_rooms import Room
from cria_dist.maths.knapsack import Menu, choose


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways to have a layer, none of them dearer and worse than another.

    Attributes:
        menu: cost and increase of the loss of each, by cost.
        widths_CK: width of each of its K sites; the first site is the layer itself.
    """

    menu: Menu
    widths_CK: NDArray[np.int64]


def mixed_widths(
    curves: Mapping[str, Curve], rooms: Mapping[str, Room], budget: float, inside: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """The widths whose measured losses add up to the least increase within the budget, layers as a whole included.

    Args:
        curves: measured losses of every site that has room.
        rooms: what each site may become; the unit of a whole layer costs what lies outside its other sites.
        budget: cost that may stay at all sites together.
        inside: the sites within each whole layer.

    Returns:
        New width per site; at a layer that goes, all are 0.

    Raises:
        PlanError: the floors keep more than the budget allows.
    """
    keys = {whole: (whole, *inside[whole]) for whole in sorted(inside)}
    ways = [_ways(curves, [rooms[key] for key in named], named) for named in keys.values()]
    chosen = choose([one.menu for one in ways], budget)
    return {
        key: int(width)
        for named, one, index in zip(keys.values(), ways, chosen, strict=True)
        for key, width in zip(named, one.widths_CK[index], strict=True)
    }


def _ways(curves: Mapping[str, Curve], rooms: Sequence[Room], named: Sequence[str]) -> Ways:
    whole = rooms[0]
    costs_C, losses_C, widths_CK = np.array([whole.unit_cost]), np.zeros(1), np.ones((1, 1), dtype=np.int64)
    for key, one in zip(named[1:], rooms[1:], strict=True):
        widths = np.asarray(one.widths)
        increase = curves[key].increase_at(widths.astype(np.float64)) if key in curves else np.zeros(widths.size)
        costs_C = np.add.outer(costs_C, one.costs(widths.astype(np.float64))).ravel()
        losses_C = np.add.outer(losses_C, increase).ravel()
        repeated = np.repeat(widths_CK, widths.size, axis=0)
        widths_CK = np.column_stack([repeated, np.tile(widths, len(widths_CK))])
    if whole.smallest == 0:
        removed = curves[named[0]].increase_at(np.zeros(1))
        costs_C, losses_C = np.append(costs_C, 0.0), np.append(losses_C, removed)
        widths_CK = np.vstack([widths_CK, np.zeros((1, len(named)), dtype=np.int64)])
    order = np.lexsort((losses_C, costs_C))
    best_C = np.minimum.accumulate(losses_C[order])
    better = order[np.concatenate([[True], best_C[1:] < best_C[:-1]])]
    return Ways(Menu(costs_C[better], losses_C[better]), widths_CK[better])
