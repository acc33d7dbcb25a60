"""One candidate per site so that the total loss is least within a budget: the multiple-choice knapsack.

Costs are a table, so they may be anything that adds up over sites: parameters, MACs, bytes of a cache, milliseconds.
Shapes: C candidates of a site.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

from cria_dist.errors import PlanError
from cria_dist.records import Float64

EXACT_LIMIT = 10_000
"""Candidates of all sites up to which the exact choice is searched (measured: 6,400 in 0.8 s on one core)."""
NODES = 500
"""Nodes of the search tree after which the best choice found is taken: sites that are nearly alike can be exchanged at
next to no loss, and to prove that no exchange helps takes hours. A limit of time would make the choice depend on the
machine. Measured on 30 layers alike to 3 %: after 500 nodes (6 s) what is found is at most 0.07 % above the least, and
as good after 200."""
GAP = 1e-4
"""Share of the least total loss that a choice may be above it; measured losses say no more."""
TOLERANCE = 1e-6
"""Rounding that a budget forgives, in units of the smallest difference between costs."""


@dataclass(frozen=True, slots=True)
class Menu:
    """The candidates of one site, the cheapest first.

    Attributes:
        costs_C: what each takes of the budget, ascending.
        losses_C: what each does to the loss.
    """

    costs_C: Float64
    losses_C: Float64


def choose(menus: Sequence[Menu], budget: float) -> list[int]:
    """One candidate per site: by search for problems of ordinary size, else greedily; then the rest is filled up.

    Args:
        menus: candidates of every site.
        budget: what the chosen candidates may cost together.

    Returns:
        Index of the candidate per site. No other candidate of a site fits in what is left of the budget without a
        higher loss, so with losses that never rise with the cost less than one step is left.

    Raises:
        PlanError: the cheapest candidates cost more than the budget.
    """
    small = sum(menu.costs_C.size for menu in menus) <= EXACT_LIMIT
    choices = (choose_exact, choose_greedily) if small else (choose_greedily,)
    found = [_fill_up(menus, budget, choice(menus, budget)) for choice in choices]
    return min(found, key=lambda chosen: _loss(menus, chosen))  # the first of equals


def choose_exact(menus: Sequence[Menu], budget: float) -> list[int]:
    """The least total loss within the budget to ``GAP``, by mixed-integer programming (HiGHS).

    A search that takes more than ``NODES`` nodes ends with the best it has found, or with the greedy choice where it
    has found nothing.

    Args:
        menus: candidates of every site.
        budget: what the chosen candidates may cost together.

    Returns:
        Index of the candidate per site.

    Raises:
        PlanError: the cheapest candidates cost more than the budget.
    """
    _check(menus, budget)
    losses, costs = (np.concatenate(values) for values in zip(*((m.losses_C, m.costs_C) for m in menus), strict=True))
    one_each = block_diag([np.ones((1, menu.costs_C.size)) for menu in menus], format="csr")
    step = _step(menus)  # the solver's tolerance is absolute
    within = LinearConstraint(csr_array(costs[np.newaxis] / step), -np.inf, budget / step)
    result = milp(
        losses / (np.abs(losses).max() or 1.0),
        integrality=np.ones_like(losses),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if result.x is None:
        return choose_greedily(menus, budget)
    starts = np.cumsum([0, *(menu.costs_C.size for menu in menus)])
    return [int(np.argmax(result.x[start:stop])) for start, stop in itertools.pairwise(starts)]


def choose_greedily(menus: Sequence[Menu], budget: float) -> list[int]:
    """Steps down the lower convex hull of every site, the least loss per cost first, until the budget is kept.

    The total loss is at most that of the exact choice plus the last step's: before it stands the optimum of the linear
    relaxation (Sinha & Zoltners 1979, "The multiple-choice knapsack problem"). Of two budgets, the smaller one gives
    every site the same candidate or a cheaper one.

    Args:
        menus: candidates of every site.
        budget: what the chosen candidates may cost together.

    Returns:
        Index of the candidate per site.

    Raises:
        PlanError: the cheapest candidates cost more than the budget.
    """
    _check(menus, budget)
    hulls = [_lower_hull(menu) for menu in menus]
    chosen = [int(hull[-1]) for hull in hulls]
    steps = sorted(
        ((menu.losses_C[low] - menu.losses_C[high]) / (menu.costs_C[high] - menu.costs_C[low]), site, -depth, int(low))
        for site, (menu, hull) in enumerate(zip(menus, hulls, strict=True))
        for depth, (low, high) in enumerate(itertools.pairwise(hull))
    )
    left = (
        budget + TOLERANCE * _step(menus) - sum(menu.costs_C[index] for menu, index in zip(menus, chosen, strict=True))
    )
    for _, site, _, low in steps:
        if left >= 0:
            break
        costs_C = menus[site].costs_C
        left += costs_C[chosen[site]] - costs_C[low]
        chosen[site] = low
    return chosen


def _lower_hull(menu: Menu) -> NDArray[np.int64]:
    """Candidates on the lower convex hull of (cost, loss), from the cheapest to the one of least loss."""
    hull: list[int] = []
    last = int(np.argmin(menu.losses_C))  # what costs more and is not better is never taken
    for index in range(last + 1):
        while len(hull) > 1 and not _turns_up(menu, hull[-2], hull[-1], index):
            hull.pop()
        hull.append(index)
    return np.asarray(hull)


def _turns_up(menu: Menu, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies below the line between the two others."""
    costs_C, losses_C = menu.costs_C, menu.losses_C
    left = (losses_C[middle] - losses_C[first]) * (costs_C[last] - costs_C[middle])
    right = (losses_C[last] - losses_C[middle]) * (costs_C[middle] - costs_C[first])
    return bool(left < right)


def _fill_up(menus: Sequence[Menu], budget: float, chosen: list[int]) -> list[int]:
    """Spend what is left: the site that gains most moves to a dearer candidate, until none fits."""
    tolerance = TOLERANCE * _step(menus)
    chosen = list(chosen)
    while True:
        left = budget - sum(menu.costs_C[index] for menu, index in zip(menus, chosen, strict=True))
        moves = [
            (menu.losses_C[other] - menu.losses_C[index], menu.costs_C[index] - menu.costs_C[other], site, other)
            for site, (menu, index) in enumerate(zip(menus, chosen, strict=True))
            for other in range(index + 1, menu.costs_C.size)
            if menu.costs_C[other] - menu.costs_C[index] <= left + tolerance
            and menu.losses_C[other] <= menu.losses_C[index]
        ]
        if not moves:
            return chosen
        _, _, site, other = min(moves)  # of equal gains, the one that spends most
        chosen[site] = other


def _loss(menus: Sequence[Menu], chosen: Sequence[int]) -> float:
    return sum(float(menu.losses_C[index]) for menu, index in zip(menus, chosen, strict=True))


def _step(menus: Sequence[Menu]) -> float:
    """Smallest difference between the costs of two candidates of a site."""
    differences = np.concatenate([np.diff(menu.costs_C) for menu in menus])
    return float(differences.min()) if differences.size else 1.0


def _check(menus: Sequence[Menu], budget: float) -> None:
    least = sum(float(menu.costs_C[0]) for menu in menus)
    if least > budget + TOLERANCE * _step(menus):
        raise PlanError(
            f"the budget leaves {budget:,.0f}, but the least that must stay costs {least:,.0f}; "
            "lower prune.ratio or prune.floor"
        )
