"""Widths from the scores of all sites at once: what matters least anywhere goes first.

Shapes: N units of a site.
"""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from cria_dist.errors import PlanError
from cria_dist.maths.allocation_rooms import Room
from cria_dist.records import Float64


def shares(keep_N: Float64) -> Float64:
    """Scores as shares of their site's sum; the dead have none, and negative scores are counted from the lowest.

    Returns:
        float64 [N], not negative, of sum 1 (of sum 0 where every unit scores the same zero).
    """
    alive_N = np.isfinite(keep_N)
    if not alive_N.any():
        return np.zeros_like(keep_N)
    lowest = min(0.0, float(keep_N[alive_N].min()))
    counted_N = np.where(alive_N, keep_N - lowest, 0.0)
    total = float(counted_N.sum())
    return counted_N / total if total > 0 else counted_N


def global_widths(
    keep: Mapping[str, Float64], rooms: Mapping[str, Room], budget: float, comparable: bool = False
) -> dict[str, int]:
    """Remove groups of one multiple, the least share of the site's score per cost first, until the budget is kept.

    Of equal groups, the one goes whose site has lost least so far, then the first site's: scores that say nothing
    give even widths. Of two budgets, the smaller one leaves no site wider; less than one group more than asked for
    is removed.

    Args:
        keep: score per unit [N] and site, higher means keep, ``-inf`` for the dead.
        rooms: what each site may become.
        budget: cost that may stay at all sites together.
        comparable: the scores of all sites are on one scale, and stand for themselves in place of their shares.

    Returns:
        New width per site.

    Raises:
        PlanError: the floors keep more than the budget allows.

    *Source:* the global ranking of normalised scores of FLAP (arXiv 2312.11983), with shares of the sum, which may be
    divided by a cost, in place of its standard scores, and with floors.
    """
    widths = {key: one.width for key, one in rooms.items()}
    cost = sum(one.width * one.unit_cost for one in rooms.values())
    tolerance = 1e-9 * cost
    keys = sorted(rooms)
    scores = keep if comparable else {key: shares(keep[key]) for key in keys}
    steps = (step for order, key in enumerate(keys) for step in _steps(order, scores[key], rooms[key]))
    for *_, order, width in sorted(steps):
        key = keys[order]
        if cost <= budget + tolerance:
            return widths
        cost -= (widths[key] - width) * rooms[key].unit_cost
        widths[key] = width
    if cost > budget + tolerance:
        raise PlanError(
            f"the budget leaves {budget:,.0f}, but the floors keep {cost:,.0f}; lower prune.ratio or prune.floor"
        )
    return widths


def _steps(order: int, score_N: Float64, one: Room) -> Iterator[tuple[float, float, int, int]]:
    """Every removal at a site: score per cost, share of the site already gone, the site, its width then."""
    ascending_N = np.sort(score_N)
    bounds = one.widths[::-1]
    means = [ascending_N[one.width - before : one.width - after].mean() for before, after in itertools.pairwise(bounds)]
    # equal scores may have means that fall in the last digit, and a later removal would come before an earlier one
    rising = np.maximum.accumulate(means)
    for score, (before, after) in zip(rising.tolist(), itertools.pairwise(bounds), strict=True):
        yield score / one.unit_cost, 1 - before / one.width, order, after
