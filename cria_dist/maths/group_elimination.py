"""Optimal brain surgeon on groups of inputs of a linear map: heads, each with several signals.

Shapes: G groups, N signals (G * span), A signals of the groups still there, D outputs of the linear map, B of a group.
"""

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.errors import NumericError
from cria_dist.maths.elimination import Elimination, precision_matrix


def eliminate_groups(gram_NN: Array, weight_DN: Array, span: int, ridge: float) -> Elimination:
    """Greedy backward elimination of whole groups, the others refitted after every step.

    With ``P = (G + r I)^-1``, leaving out the signals B of a group and refitting the others raises the squared error of
    the output by ``tr(W_B (P_BB)^-1 W_B^T)`` (the block form of Hassibi and Stork, Optimal Brain Surgeon, 1993). There
    are few groups, so every one is tried at every step: ``G^2 span^3 + N^3`` floating point operations in all.

    Args:
        gram_NN: sum over tokens of the outer product of the signals, float64.
        weight_DN: linear map that reads them, float64.
        span: signals per group, one after the other.
        ridge: relative ridge, > 0.

    Returns:
        The groups in the order they go, and the cost of each step.

    Raises:
        NumericError: the matrix is not finite, singular with the ridge, or not of whole groups.
    """
    xp, size = arrays.namespace(gram_NN), gram_NN.shape[0]
    if size % span:
        raise NumericError(f"{size} signals are not groups of {span}; record the site again")
    precision_AA, weight_DA = precision_matrix(gram_NN, ridge), weight_DN
    left = list(range(size // span))
    order, cost = np.empty(len(left), dtype=np.int64), np.empty(len(left))
    for step in range(len(left)):
        halves = [_half(precision_AA, weight_DA, _signals(place, span)) for place in range(len(left))]
        costs_G = [float(xp.sum(half_BD * half_BD)) for _, half_BD in halves]
        place = int(np.argmin(costs_G))
        order[step], cost[step] = left.pop(place), costs_G[place]
        half_BA, half_BD = halves[place]
        stay_A = xp.asarray(np.delete(np.arange(precision_AA.shape[0]), _signals(place, span)))
        half_BA = xp.take(half_BA, stay_A, axis=1)
        weight_DA = xp.take(weight_DA, stay_A, axis=1) - half_BD.T @ half_BA
        precision_AA = xp.take(xp.take(precision_AA, stay_A, axis=0), stay_A, axis=1) - half_BA.T @ half_BA
    return Elimination(order, cost)


def _signals(place: int, span: int) -> slice:
    return slice(place * span, (place + 1) * span)


def _half(precision_AA: Array, weight_DA: Array, at: slice) -> tuple[Array, Array]:
    """``L^-1 P_BA`` and ``L^-1 W_B^T`` with ``P_BB = L L^T``: their products are what a group's removal changes."""
    rows_BA = precision_AA[at, :]
    factor_BB = arrays.namespace(precision_AA).linalg.cholesky(rows_BA[:, at])
    return arrays.solve_lower(factor_BB, rows_BA), arrays.solve_lower(factor_BB, weight_DA[:, at].T)
