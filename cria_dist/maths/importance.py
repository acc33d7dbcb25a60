"""From edge distortions to neuron scores, and from scores to the units that go.

Shapes: N units, E edges.
"""

import numpy as np
from numpy.typing import NDArray

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.records import Float64, Int32


def mean_over_neighbours(edge_scores_E: Array, edges_E2: Array, size: int) -> Array:
    """Node score: the mean score of a neuron's edges in the input graph (SPADE's node score), float64 [N]."""
    xp = arrays.namespace(edge_scores_E)
    ends = xp.reshape(edges_E2, (-1,))
    total_N = arrays.totals(xp.repeat(edge_scores_E, 2), ends, size)
    return total_N / arrays.totals(xp.ones(ends.shape[0], dtype=xp.float64), ends, size)


def lowest(keep_N: Float64, count: int) -> NDArray[np.int64]:
    """The ``count`` units with the lowest scores, ties by index; sorted indices."""
    order = np.argsort(keep_N, kind="stable")
    return np.sort(order[:count])


def lowest_guarded(keep_N: Float64, count: int, edges_E2: Int32) -> NDArray[np.int64]:
    """The lowest units, at most one of each neighbourhood while others are left (neighbour guard).

    Near-duplicates score alike and would all fall together. Walk the units in ascending score; take a unit unless a
    neighbour in the input graph was taken; if that gives fewer than ``count``, fill up from the skipped in score
    order. Dead units (``-inf``) are taken first and ban nobody.

    Args:
        keep_N: scores, higher means keep.
        count: how many units go.
        edges_E2: edges of the input graph.

    Returns:
        Sorted indices of the units to remove, int64 [count].
    """
    neighbours = _adjacency_lists(edges_E2, keep_N.shape[0])
    banned_N = np.zeros(keep_N.shape[0], dtype=bool)
    taken: list[int] = []
    skipped: list[int] = []
    for unit in np.argsort(keep_N, kind="stable").tolist():
        if len(taken) == count:
            break
        if banned_N[unit]:
            skipped.append(unit)
            continue
        taken.append(unit)
        if np.isfinite(keep_N[unit]):
            banned_N[neighbours[unit]] = True
    taken += skipped[: count - len(taken)]
    return np.sort(np.asarray(taken, dtype=np.int64))


def _adjacency_lists(edges_E2: Int32, size: int) -> list[NDArray[np.int64]]:
    both = np.concatenate([edges_E2, edges_E2[:, ::-1]]).astype(np.int64)
    both = both[np.argsort(both[:, 0], kind="stable")]
    starts = np.searchsorted(both[:, 0], np.arange(size + 1))
    return [both[starts[unit] : starts[unit + 1], 1] for unit in range(size)]
