"""Widths of units inside layers and whole layers from one budget: a layer is narrowed, or it goes with all it has.

Some sites may have to be alike in all layers that stay (experts): then every width they can have is tried.

Shapes: C ways to have a layer.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cria_dist.errors import PlanError
from cria_dist.maths.allocation_curves import Curve
from cria_dist.maths.allocation_rooms import Room, least_of_layer
from cria_dist.maths.knapsack import Menu, choose


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways to have a layer, none of them dearer than another and worse (or no better).

    Attributes:
        menu: cost and increase of the loss of each, by cost.
        widths_CK: width of each of its K sites; the first site is the layer itself.
    """

    menu: Menu
    widths_CK: NDArray[np.int64]


def mixed_widths(
    curves: Mapping[str, Curve],
    rooms: Mapping[str, Room],
    budget: float,
    inside: Mapping[str, Sequence[str]],
    spent: bool = False,
) -> dict[str, int]:
    """The widths whose measured losses add up to the least increase within the budget, layers as a whole included.

    Args:
        curves: measured losses of every site that has room.
        rooms: what each site may become; the unit of a whole layer costs what lies outside its other sites.
        budget: cost that may stay at all sites together.
        inside: the sites within each whole layer.
        spent: what costs nothing of the loss goes only as far as the budget asks for it; else it goes in any case.

    Returns:
        New width per site; at a layer that goes, all are 0, which not every layer does.

    Raises:
        PlanError: the floors keep more than the budget allows.
    """
    keys = {whole: (whole, *inside[whole]) for whole in sorted(inside)}
    ways = [_ways(curves, [rooms[key] for key in named], named, spent) for named in keys.values()]
    chosen = choose([one.menu for one in ways], budget)
    found = {
        key: int(width)
        for named, one, index in zip(keys.values(), ways, chosen, strict=True)
        for key, width in zip(named, one.widths_CK[index], strict=True)
    }
    if any(found[whole] for whole in keys):
        return found
    # a model has a layer; and where none is missed, the budget alone says how much goes
    least = {whole: least_of_layer(rooms, whole, inside[whole]) for whole in keys}
    possible = [whole for whole in keys if least[whole] <= budget] or [min(least, key=least.__getitem__)]
    staying = [{**rooms, whole: replace(rooms[whole], smallest=1)} for whole in possible]
    each = [mixed_widths(curves, one, budget, inside, spent=True) for one in staying]
    return min(each, key=lambda widths: _increase(curves, widths, inside))


def alike_widths(
    solve: Callable[[Mapping[str, Room]], dict[str, int]],
    curves: Mapping[str, Curve],
    rooms: Mapping[str, Room],
    alike: Collection[str],
    inside: Mapping[str, Sequence[str]],
) -> dict[str, int]:
    """The best of what is found where some sites have the same width, over all that they can have.

    Args:
        solve: finds the widths within the budget, those of these sites given.
        curves: measured losses of every site that has room.
        rooms: what each site may become.
        alike: sites that stay with the same width.
        inside: the sites within each whole layer that may go, and these with it.

    Returns:
        New width per site; of equal losses, those that spend most.

    Raises:
        PlanError: no width they can have keeps the budget.
    """
    found = list[dict[str, int]]()
    for width in sorted(set[int].intersection(*({*rooms[key].widths} for key in alike))):
        given = {key: replace(rooms[key], width=width, smallest=width) for key in alike}
        try:
            found.append(solve({**rooms, **given}))
        except PlanError:
            if not found:
                raise
            break  # wider ones cost more
    return min(found, key=lambda widths: (_increase(curves, widths, inside), -_cost(rooms, widths)))


def _cost(rooms: Mapping[str, Room], widths: Mapping[str, int]) -> float:
    return sum(rooms[key].cost(width) for key, width in widths.items())


def _increase(curves: Mapping[str, Curve], widths: Mapping[str, int], inside: Mapping[str, Sequence[str]]) -> float:
    """What the losses add up to; a layer that goes costs its own, whatever is inside."""
    gone = {key for whole, keys in inside.items() if not widths[whole] for key in keys}
    counted = [(curves[key], width) for key, width in widths.items() if key in curves and key not in gone]
    return sum(float(curve.increase_at(np.array([width], dtype=np.float64))[0]) for curve, width in counted)


def _ways(curves: Mapping[str, Curve], rooms: Sequence[Room], named: Sequence[str], spent: bool) -> Ways:
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
    losses, best_C = losses_C[order], np.minimum.accumulate(losses_C[order])
    as_good = (losses[1:] == best_C[:-1]) & (np.diff(costs_C[order]) > 0) if spent else False
    better = order[np.concatenate([[True], (losses[1:] < best_C[:-1]) | as_good])]
    return Ways(Menu(costs_C[better], losses_C[better]), widths_CK[better])
