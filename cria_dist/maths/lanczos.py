"""Thick-restart block Lanczos for the top of ``L_X v = zeta L_Y v``: a second opinion on LOBPCG.

The operator ``L_Y^+ L_X`` is symmetric in the inner product of L_Y; its systems are solved by conjugate gradients.
Every basis is orthogonalised in full and projected explicitly, so inexact solves slow it down but do not bias it.

Source: Wu and Simon, 2000. Shapes: N neurons, K eigenpairs, J basis vectors, B vectors of a block.
"""

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.errors import NumericError
from cria_dist.maths.solve import solve_laplacian

BLOCK = 6
EXTRA_KEPT = 6
GROWTH = 8  # blocks between restarts
MAX_RESTARTS = 60
SOLVE_TOLERANCE = 1e-9
LOST = 1e-10  # squared length that is left of a vector inside the basis


def fits(size: int, count: int) -> bool:
    """Whether there is room for a basis that restarts."""
    return count + EXTRA_KEPT + (GROWTH + 1) * BLOCK < size - 1


def top_eigenpairs(
    input_laplacian: Sparse, output_laplacian: Sparse, count: int, tolerance: float
) -> tuple[Array, Array]:
    """The ``count`` largest eigenpairs, values descending, ``v^T L_Y v = 1``.

    Args:
        input_laplacian: Laplacian of the input graph, CSR float64.
        output_laplacian: Laplacian of the connected output graph, CSR float64.
        count: number of pairs; ``fits`` tells whether the graph is large enough.
        tolerance: on ``|L_X v - zeta L_Y v| / (zeta |L_Y v|)`` of every pair.

    Raises:
        NumericError: not converged after 60 restarts.
    """
    xp = arrays.namespace(arrays.diagonal(output_laplacian))
    size = input_laplacian.shape[0]
    generator = np.random.default_rng(0)
    basis_NJ = xp.zeros((size, 0), dtype=xp.float64)
    block_NB = _orthonormal(output_laplacian, basis_NJ, xp.zeros((size, 0), dtype=xp.float64), generator)
    for _ in range(MAX_RESTARTS):
        for _ in range(GROWTH):
            basis_NJ = xp.concat([basis_NJ, block_NB], axis=1)
            image_NB = solve_laplacian(output_laplacian, input_laplacian @ block_NB, SOLVE_TOLERANCE)
            block_NB = _orthonormal(output_laplacian, basis_NJ, image_NB, generator)
        values_J, turn_JJ = xp.linalg.eigh(basis_NJ.T @ (input_laplacian @ basis_NJ))
        values_J, turn_JJ = xp.flip(values_J), xp.flip(turn_JJ, axis=1)
        basis_NJ = basis_NJ @ turn_JJ[:, : count + EXTRA_KEPT]
        values_K, vectors_NK = values_J[:count], basis_NJ[:, :count]
        right_NK = (output_laplacian @ vectors_NK) * values_K
        error_K = xp.linalg.vector_norm(input_laplacian @ vectors_NK - right_NK, axis=0)
        if bool(xp.all(error_K <= tolerance * xp.linalg.vector_norm(right_NK, axis=0))):
            return values_K, vectors_NK
    raise NumericError(f"Lanczos did not converge to {count} eigenpairs in {MAX_RESTARTS} restarts")


def _orthonormal(metric: Sparse, basis_NJ: Array, block_NB: Array, generator: np.random.Generator) -> Array:
    """B vectors orthonormal to the basis and each other; random ones stand in for those inside the basis.

    An invariant subspace (repeated eigenvalues, equal graphs) ends a Krylov space; the random vectors open the next.
    """
    xp = arrays.namespace(basis_NJ)
    while True:
        missing = BLOCK - block_NB.shape[1]
        random = xp.asarray(generator.standard_normal((basis_NJ.shape[0], missing)))
        block_NB = xp.concat([block_NB, random], axis=1)
        block_NB = block_NB / xp.sqrt(xp.sum(block_NB * (metric @ block_NB), axis=0))
        for _ in range(2):
            block_NB = block_NB - basis_NJ @ (basis_NJ.T @ (metric @ block_NB))
            block_NB = block_NB - xp.mean(block_NB, axis=0)
        for _ in range(2):
            squared_B, turn_BB = xp.linalg.eigh(block_NB.T @ (metric @ block_NB))
            kept = slice(int(xp.sum(xp.astype(squared_B <= LOST, xp.int64))), None)  # ascending
            block_NB = block_NB @ turn_BB[:, kept] / xp.sqrt(squared_B[kept])
        if block_NB.shape[1] == BLOCK:
            return block_NB
