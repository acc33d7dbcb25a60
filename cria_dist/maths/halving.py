"""Asynchronous successive halving (Li et al., 2020, arXiv:1810.05934), by stopping what falls behind.

The rule is that of Ray Tune's ``ASHAScheduler``: a trial is compared at a rung with those that were there before it.
"""

from collections.abc import Sequence

import numpy as np


def rung(step: int, grace: int, factor: int) -> int | None:
    """The highest rung, ``grace * factor**k`` steps, that so many steps have reached; None below the first."""
    if step < grace:
        return None
    found = grace
    while found * factor <= step:
        found *= factor
    return found


def is_behind(loss: float, others: Sequence[float], factor: int) -> bool:
    """Whether a loss is not among the least ``1 / factor`` of those that came to the same rung before.

    Others that are not finite are left out; a loss that is not a number is behind any that is.
    """
    there = [other for other in others if np.isfinite(other)]
    return bool(there) and not loss <= float(np.quantile(there, 1 / factor))
