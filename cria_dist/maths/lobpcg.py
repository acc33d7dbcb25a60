"""LOBPCG for the top of ``L_X v = zeta L_Y v``, preconditioned with the degrees of the output graph.

It stops when the wanted pairs have converged (the guard vectors need not), lets converged ones rest, and drops
directions that depend on the others, so repeated eigenvalues and equal graphs need no care.

Source: Knyazev, 2001; Duersch et al., 2018 (the basis). Shapes: N neurons, K eigenpairs, B vectors of the block, S of
the search space.
"""

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse

GUARD_VECTORS = 5
MAX_ITERATIONS = 300
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
    degree_N1 = output_laplacian.diagonal()[:, None]
    xp = arrays.namespace(degree_N1)
    block = count + GUARD_VECTORS
    front_NB = xp.asarray(np.random.default_rng(0).standard_normal((degree_N1.shape[0], block)))
    behind_NB = front_NB[:, :0]
    front = _images(input_laplacian, output_laplacian, front_NB)
    values_B, turn_SB = _ritz(front, block)
    for _ in range(MAX_ITERATIONS):
        front = _images(input_laplacian, output_laplacian, front[0] @ turn_SB)
        scaled_NB = front[2] * values_B
        error_NB = front[1] - scaled_NB
        open_B = xp.linalg.vector_norm(error_NB, axis=0) > tolerance * xp.linalg.vector_norm(scaled_NB, axis=0)
        if not bool(xp.any(open_B[:count])):
            break
        added_NS = xp.concat([error_NB[:, open_B] / degree_N1, behind_NB], axis=1)
        added_NS = added_NS - front[0] @ (front[2].T @ added_NS)
        added = _images(input_laplacian, output_laplacian, added_NS)
        front = [xp.concat(parts, axis=1) for parts in zip(front, added, strict=True)]
        values_B, turn_SB = _ritz(front, block)
        behind_NB = added[0] @ turn_SB[block:, open_B]
    return values_B[:count], front[0][:, :count]


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
    kept = slice(int(xp.sum(lengths_S <= DEPENDENT)), None)  # ascending
    basis_SR = turn_SS[:, kept] / xp.sqrt(lengths_S[kept])
    values_R, inner_RR = xp.linalg.eigh(basis_SR.T @ (energy_SS * scale_SS) @ basis_SR)
    inner_RB = xp.flip(inner_RR, axis=1)[:, :block]
    return xp.flip(values_R)[:block], scale_S[:, None] * (basis_SR @ inner_RB)
