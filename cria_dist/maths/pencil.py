"""The generalised eigenproblem between the two graphs of a site: ``L_X v = zeta L_Y v``.

X is the input graph (pre-activation), Y the output graph (post-activation), both connected over the same N neurons.
The common null space span(1) is deflated, never shifted away. All in float64.

Source: SPADE (arXiv 2102.03716), whose operator ``L_Y^+ L_X`` Cria (arXiv 2605.18860) applies to neurons.
Shapes: N neurons, K eigenpairs, E edges.
"""

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.errors import NumericError

DENSE_LIMIT = 4096
EDGE_BLOCK = 512  # two gathered blocks stay in the cache
GUARD_VECTORS = 5
RESIDUAL_TOLERANCE = 1e-6
PIVOT_TOLERANCE = 1e-12


def all_eigenvalues(input_laplacian: Sparse, output_laplacian: Sparse) -> Array:
    """The N - 1 generalised eigenvalues outside the null space, descending.

    Dense: ``C^-1 L_X C^-T`` with ``L_Y + 11^T/N = C C^T``; O(N^3) time, three N x N arrays.
    """
    xp_values = _reduced(input_laplacian, output_laplacian)[0]
    values_N = arrays.namespace(xp_values).linalg.eigvalsh(xp_values)
    return arrays.namespace(values_N).flip(values_N)[:-1]


def top_eigenpairs(input_laplacian: Sparse, output_laplacian: Sparse, count: int) -> tuple[Array, Array, float]:
    """The ``count`` largest generalised eigenpairs.

    Dense for N <= 4096; beyond, LOBPCG on the swapped pencil (smallest ``mu = 1 / zeta`` of ``L_Y v = mu L_X v``), for
    which the degrees of the output graph are a good preconditioner.

    Args:
        input_laplacian: Laplacian of the input graph, CSR float64.
        output_laplacian: Laplacian of the output graph, CSR float64.
        count: number of pairs, 1 <= count <= N - 1.

    Returns:
        values_K descending, vectors_NK with ``v^T L_Y v = 1`` and ``v`` orthogonal to 1, and the largest residual.

    Raises:
        NumericError: too few neurons, or a residual above 1e-6.
    """
    size = input_laplacian.shape[0]
    if not 1 <= count < size:
        raise NumericError(f"{count} eigenpairs asked of {size} neurons; at most {size - 1} exist")
    few = 5 * (count + GUARD_VECTORS) < size - 1  # LOBPCG cannot do more
    solve = _top_iterative if few and size > DENSE_LIMIT else _top_dense
    values_K, vectors_NK = solve(input_laplacian, output_laplacian, count)
    worst = residual(input_laplacian, output_laplacian, values_K, vectors_NK)
    if values_K.shape[0] != count or not worst <= RESIDUAL_TOLERANCE:
        raise NumericError(
            f"{values_K.shape[0]} of {count} eigenpairs converged, residual {worst:.1e} (limit "
            f"{RESIDUAL_TOLERANCE:.0e}); record more tokens or lower method.eigenpairs"
        )
    return values_K, vectors_NK, worst


def residual(input_laplacian: Sparse, output_laplacian: Sparse, values_K: Array, vectors_NK: Array) -> float:
    """Largest ``|L_X v - zeta L_Y v| / (|L_X v| + zeta |L_Y v|)`` over the pairs."""
    xp = arrays.namespace(values_K)
    left_NK = input_laplacian @ vectors_NK
    right_NK = (output_laplacian @ vectors_NK) * values_K[None, :]
    error_K = xp.linalg.vector_norm(left_NK - right_NK, axis=0)
    scale_K = xp.linalg.vector_norm(left_NK, axis=0) + xp.linalg.vector_norm(right_NK, axis=0)
    return float(xp.max(error_K / scale_K))


def distortion_of_edges(values_K: Array, vectors_NK: Array, edges_E2: Array) -> Array:
    """SPADE edge score ``sum_i zeta_i (v_i(p) - v_i(q))^2`` for each edge, float64 [E]."""
    xp = arrays.namespace(values_K)
    difference_EK = vectors_NK[edges_E2[:, 0]] - vectors_NK[edges_E2[:, 1]]
    return xp.sum(difference_EK * difference_EK * values_K[None, :], axis=1)


def full_distortion_of_edges(input_laplacian: Sparse, output_laplacian: Sparse, edges_E2: Array) -> Array:
    """The edge score over the whole spectrum, without eigenvectors.

    With L_Y-orthonormal eigenvectors ``sum_i zeta_i v_i v_i^T = L_Y^+ L_X L_Y^+ = M``, so the score of edge (p, q) is
    ``M_pp + M_qq - 2 M_pq``. One Cholesky factor, one inverse, one sparse-dense product; float64 [E].
    """
    xp = arrays.namespace(edges_E2)
    size = input_laplacian.shape[0]
    factor_NN = _factor(output_laplacian, xp)
    half_NN = arrays.solve_lower(factor_NN, xp.eye(size, dtype=xp.float64))
    pseudo_NN = half_NN.T @ half_NN - 1.0 / size
    product_NN = input_laplacian @ pseudo_NN
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    diagonal_N = xp.sum(pseudo_NN * product_NN, axis=0)
    transposed_NN = xp.asarray(product_NN.T, copy=True)
    blocks = [slice(start, start + EDGE_BLOCK) for start in range(0, left.shape[0], EDGE_BLOCK)]
    cross_E = xp.concat([xp.sum(pseudo_NN[left[block]] * transposed_NN[right[block]], axis=1) for block in blocks])
    return diagonal_N[left] + diagonal_N[right] - 2 * cross_E


def _factor(output_laplacian: Sparse, xp: Array) -> Array:
    """Lower Cholesky factor of ``L_Y + 11^T/N`` (positive definite exactly when the graph is connected)."""
    shifted_NN = arrays.dense(output_laplacian)
    shifted_NN += 1.0 / shifted_NN.shape[0]
    try:
        factor_NN = xp.linalg.cholesky(shifted_NN)
    except ValueError as error:  # numpy.linalg.LinAlgError is a ValueError; cupy gives NaN instead
        raise NumericError(f"the output graph is not connected or not finite ({error})") from error
    pivots_N = xp.linalg.diagonal(factor_NN) ** 2
    smallest = float(xp.min(pivots_N))
    if not smallest > PIVOT_TOLERANCE * float(xp.max(pivots_N)):  # a second null vector, up to rounding
        raise NumericError(f"the output graph is not connected or not finite (pivot {smallest:.0e})")
    return factor_NN


def _reduced(input_laplacian: Sparse, output_laplacian: Sparse) -> tuple[Array, Array]:
    """``C^-1 L_X C^-T`` (symmetrised against rounding) and ``C``."""
    dense_NN = arrays.dense(input_laplacian)
    xp = arrays.namespace(dense_NN)
    factor_NN = _factor(output_laplacian, xp)
    half_NN = arrays.solve_lower(factor_NN, dense_NN)
    reduced_NN = arrays.solve_lower(factor_NN, half_NN.T)
    return (reduced_NN + reduced_NN.T) / 2, factor_NN


def _top_dense(input_laplacian: Sparse, output_laplacian: Sparse, count: int) -> tuple[Array, Array]:
    reduced_NN, factor_NN = _reduced(input_laplacian, output_laplacian)
    values_K, rotated_NK = arrays.top_eigenpairs(reduced_NN, count)
    return values_K, arrays.solve_lower(factor_NN, rotated_NK, transposed=True)


def _top_iterative(input_laplacian: Sparse, output_laplacian: Sparse, count: int) -> tuple[Array, Array]:
    """LOBPCG on the swapped pencil with a few guard vectors, from a fixed start."""
    degrees_N1 = output_laplacian.diagonal()[:, None]
    xp = arrays.namespace(degrees_N1)
    size = degrees_N1.shape[0]
    block = count + GUARD_VECTORS
    start_NB = xp.asarray(np.random.default_rng(0).standard_normal((size, block)))
    ones_N1 = xp.ones((size, 1), dtype=xp.float64)
    shift = arrays.csr(
        xp.full(size, 1e-8, dtype=xp.float64), xp.arange(size), xp.arange(size), size
    )  # LOBPCG needs B positive definite; 1e-8 of the smallest degree is below the residual tolerance
    inverse_B, vectors_NB = arrays.lobpcg(
        output_laplacian, start_NB, input_laplacian + shift, lambda x: x.reshape(size, -1) / degrees_N1, ones_N1
    )
    order_K = xp.argsort(inverse_B)[:count]
    vectors_NK = vectors_NB[:, order_K]
    vectors_NK = vectors_NK - xp.mean(vectors_NK, axis=0)
    energy_K = xp.sum(vectors_NK * (output_laplacian @ vectors_NK), axis=0)
    vectors_NK = vectors_NK / xp.sqrt(energy_K)
    values_K = xp.sum(vectors_NK * (input_laplacian @ vectors_NK), axis=0)
    order_K = xp.argsort(-values_K)
    return values_K[order_K], vectors_NK[:, order_K]
