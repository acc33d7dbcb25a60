"""Neurons with exactly equal signals: take them out of a search, put them back by rule.

Shapes: N neurons, M observations, U neurons with distinct signals, K neighbours, C copies.
"""

from cria_dist import arrays
from cria_dist.arrays import Array

COMPARED_VALUES = 4_000_000


def distinct_rows(signals_NM: Array, key_N: Array) -> tuple[Array, Array]:
    """The first of each set of equal rows.

    Args:
        signals_NM: one row per neuron.
        key_N: a number per row that is equal for equal rows.

    Returns:
        Indices of the distinct rows, ascending [U]; for each row the place of its equal among them [N].
    """
    xp = arrays.namespace(signals_NM)
    size = key_N.shape[0]
    nodes_N = xp.arange(size)
    order_N = xp.argsort(key_N, stable=True)
    sorted_N = xp.take(key_N, order_N)
    leader_N = xp.take(order_N, xp.searchsorted(sorted_N, key_N))
    suspects = xp.nonzero(leader_N != nodes_N)[0]
    if suspects.shape[0] == 0:
        return nodes_N, nodes_N
    leaders = xp.take(leader_N, suspects)
    rows = max(1, COMPARED_VALUES // signals_NM.shape[1])
    equal = [
        xp.all(xp.take(signals_NM, suspects[piece], axis=0) == xp.take(signals_NM, leaders[piece], axis=0), axis=1)
        for piece in arrays.pieces(suspects.shape[0], rows)
    ]
    copies = suspects[xp.concat(equal)]  # unequal rows with equal keys stay on their own
    is_copy_N = xp.zeros(size, dtype=xp.bool)
    marks = xp.searchsorted(copies, nodes_N)
    if copies.shape[0]:
        is_copy_N = xp.take(copies, xp.minimum(marks, xp.asarray(copies.shape[0] - 1))) == nodes_N
    distinct_U = xp.nonzero(~is_copy_N)[0]
    return distinct_U, xp.searchsorted(distinct_U, xp.where(is_copy_N, leader_N, nodes_N))


def with_copies(values_UK: Array, nearest_UK: Array, owner_N: Array, k: int) -> Array:
    """Neighbours of all neurons from those of the distinct ones.

    Copies are at distance zero from each other; a copy is as far from the others as what it is a copy of. Equal
    distances are ordered by index.

    Args:
        values_UK: squared distances of the nearest distinct neurons, equal only when exactly equal.
        nearest_UK: their places among the distinct ones.
        owner_N: for each neuron the place of its equal among the distinct ones.
        k: neighbours wanted.

    Returns:
        Indices of the k nearest of each neuron, int64 [N, k].
    """
    xp = arrays.namespace(values_UK)
    size, distinct = owner_N.shape[0], values_UK.shape[0]
    members_UC = _members(owner_N, distinct, k + 1)
    zero_U1 = xp.zeros((distinct, 1), dtype=values_UK.dtype)
    groups_UG = xp.concat([xp.reshape(xp.arange(distinct), (-1, 1)), nearest_UK], axis=1)
    distance_UG = xp.concat([zero_U1 - 1, values_UK], axis=1)
    width = groups_UG.shape[1] * (k + 1)
    rows = max(1, COMPARED_VALUES // width)
    parts = []
    for piece in arrays.pieces(size, rows):
        nodes_B = xp.arange(piece.start, piece.stop)
        owner_B = xp.take(owner_N, nodes_B)
        groups = xp.reshape(xp.take(groups_UG, owner_B, axis=0), (-1,))
        index_BW = xp.reshape(xp.take(members_UC, groups, axis=0), (-1, width))
        value_BW = xp.repeat(xp.take(distance_UG, owner_B, axis=0), k + 1, axis=1)
        absent_BW = (index_BW == size) | (index_BW == nodes_B[:, None])
        value_BW = xp.where(absent_BW, xp.asarray(xp.inf, dtype=value_BW.dtype), value_BW)
        by_index_BW = xp.argsort(index_BW, axis=1, stable=True)
        by_value_BW = xp.argsort(xp.take_along_axis(value_BW, by_index_BW, axis=1), axis=1, stable=True)[:, :k]
        parts.append(xp.take_along_axis(index_BW, xp.take_along_axis(by_index_BW, by_value_BW, axis=1), axis=1))
    return xp.concat(parts)


def _members(owner_N: Array, distinct: int, count: int) -> Array:
    """The first ``count`` neurons of each set of equals by index, missing ones as N, int64 [U, C]."""
    xp = arrays.namespace(owner_N)
    size = owner_N.shape[0]
    order_N = xp.argsort(owner_N, stable=True)
    sorted_N = xp.take(owner_N, order_N)
    groups_U = xp.arange(distinct, dtype=owner_N.dtype)
    place_UC = xp.searchsorted(sorted_N, groups_U)[:, None] + xp.arange(count)[None, :]
    within_UC = place_UC < xp.searchsorted(sorted_N, groups_U, side="right")[:, None]
    inside = xp.reshape(xp.minimum(place_UC, xp.asarray(size - 1)), (-1,))
    members_UC = xp.reshape(xp.take(order_N, inside), place_UC.shape)
    return xp.where(within_UC, members_UC, xp.asarray(size))
