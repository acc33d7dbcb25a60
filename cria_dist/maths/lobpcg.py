"""LOBPCG for the top of ``L_X v = zeta L_Y v``, preconditioned with the degrees of the output graph.

It stops when the wanted pairs have converged (the guard vectors need not), lets converged ones rest, and drops
directions that depend on the others, so repeated eigenvalues and equal graphs need no care.
The images of all directions are computed afresh: combining them from earlier ones saves a quarter of the time and gives
wrong values where components hang together by one edge.

Source: Knyazev, 2001; Duersch et al., 2018 (the basis). Shapes: N neurons, K eigenpairs, B vectors of the block, S of
the search space.
"""

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse

GUARD_VECTORS = 5
MAX_ITERATIONS = 300
START_NOISE = 0.1  # length beside that of the peak
DEPENDENT = 1e-12  # eigenvalue of the Gram matrix of unit vectors


def top_eigenpairs(
    input_laplacian: Sparse, output_laplacian: Sparse, count: int, tolerance: float
) -> tuple[Array, Array]:
    """The ``count`` largest eigenpairs as far as they converged, values descending, ``v^T L_Y v = 1``.

    Args:
        input_laplacian: Laplacian of the input graph, CSR float64.
        output_laplacian: Laplacian of the connected output graph, CSR float64.
        count: number of pairs, at most about a fifth of the neurons.
        tolerance: on ``|L_X v - zeta L_Y v| / (zeta |L_Y v|)`` of every pair; the caller checks what was reached.
    """
    degree_N1 = arrays.diagonal(output_laplacian)[:, None]
    xp = arrays.namespace(degree_N1)
    block = count + GUARD_VECTORS
    ratio_N = arrays.diagonal(input_laplacian) / degree_N1[:, 0]
    front = _images(input_laplacian, output_laplacian, _start(ratio_N, block))
    behind_NB = front[0][:, :0]
    values_B, turn_SB = _ritz(front, block)
    for _ in range(MAX_ITERATIONS):
        front = _images(input_laplacian, output_laplacian, front[0] @ turn_SB)
        scaled_NB = front[2] * values_B
        error_NB = front[1] - scaled_NB
        open_B = xp.linalg.vector_norm(error_NB, axis=0) > tolerance * xp.linalg.vector_norm(scaled_NB, axis=0)
        if not bool(xp.any(open_B[:count])):
            break
        still = xp.nonzero(open_B)[0]
        added_NS = xp.concat([xp.take(error_NB, still, axis=1) / degree_N1, behind_NB], axis=1)
        added_NS = added_NS - front[0] @ (front[2].T @ added_NS)
        added = _images(input_laplacian, output_laplacian, added_NS)
        front = [xp.concat(parts, axis=1) for parts in zip(front, added, strict=True)]
        values_B, turn_SB = _ritz(front, block)
        behind_NB = added[0] @ xp.take(turn_SB[block:, :], still, axis=1)
    return values_B[:count], front[0][:, :count]


def _start(ratio_N: Array, block: int) -> Array:
    """Noise around the neurons with the largest degree in X over that in Y: the top vectors peak on a few of them."""
    xp = arrays.namespace(ratio_N)
    size = ratio_N.shape[0]
    noise_NB = xp.asarray(np.random.default_rng(0).standard_normal((size, block)))
    peaks_B = xp.argsort(ratio_N, stable=True)[size - block :]
    return START_NOISE / size**0.5 * noise_NB + xp.astype(xp.arange(size)[:, None] == peaks_B[None, :], xp.float64)


def _images(left: Sparse, right: Sparse, vectors_NB: Array) -> list[Array]:
    """Vectors without their mean, and what the two Laplacians make of them."""
    xp = arrays.namespace(vectors_NB)
    vectors_NB = vectors_NB - xp.mean(vectors_NB, axis=0)
    return [vectors_NB, left @ vectors_NB, right @ vectors_NB]


def _ritz(space: list[Array], block: int) -> tuple[Array, Array]:
    """The largest Ritz values of the search space, descending, and their vectors as combinations of it [S, B]."""
    xp = arrays.namespace(space[0])
    gram_SS, energy_SS = space[0].T @ space[2], space[0].T @ space[1]
    squared_S = xp.linalg.diagonal(gram_SS)
    scale_S = xp.where(squared_S > 0, 1 / xp.sqrt(xp.where(squared_S > 0, squared_S, 1.0)), 0.0)
    scale_SS = scale_S[:, None] * scale_S[None, :]
    lengths_S, turn_SS = xp.linalg.eigh(gram_SS * scale_SS)
    kept = slice(int(xp.sum(xp.astype(lengths_S <= DEPENDENT, xp.int64))), None)  # ascending
    basis_SR = turn_SS[:, kept] / xp.sqrt(lengths_S[kept])
    values_R, inner_RR = xp.linalg.eigh(basis_SR.T @ (energy_SS * scale_SS) @ basis_SR)
    inner_RB = xp.flip(inner_RR, axis=1)[:, :block]
    return xp.flip(values_R)[:block], scale_S[:, None] * (basis_SR @ inner_RB)
