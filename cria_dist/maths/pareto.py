"""The points that no other point beats.

Shape suffixes: P points, D quantities, all of which are better when smaller.
"""

import numpy as np
from numpy.typing import NDArray


def front(points_PD: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points are on the Pareto front: none is at least as small in everything and smaller in something.

    Args:
        points_PD: one row per point; a row with a number that is not finite is never on the front.

    Returns:
        One truth value per point, [P]; equal points are on it together.
    """
    finite_P = np.isfinite(points_PD).all(axis=1)
    front_P = np.zeros(len(points_PD), dtype=np.bool_)
    for index in np.flatnonzero(finite_P):
        others_PD = points_PD[finite_P]
        no_larger_P = (others_PD <= points_PD[index]).all(axis=1)
        smaller_P = (others_PD < points_PD[index]).any(axis=1)
        front_P[index] = not (no_larger_P & smaller_P).any()
    return front_P
