"""The generalised eigenproblem between the two graphs of a site: ``L_X v = zeta L_Y v``.

X is the input graph (pre-activation), Y the output graph (post-activation), both connected over the same N neurons.
The common null space span(1) is deflated, never shifted away. All in float64.

Source: SPADE (arXiv 2102.03716), whose operator ``L_Y^+ L_X`` Cria (arXiv 2605.18860) applies to neurons.
Shapes: N neurons, K eigenpairs, E edges.
"""

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.errors import NumericError
from cria_dist.maths import lanczos, lobpcg

DENSE_LIMIT = 1024  # beyond, LOBPCG is faster than a factorisation
EDGE_BLOCK = 512  # two gathered blocks stay in the cache
RESIDUAL_TOLERANCE = 1e-6
ITERATIVE_TOLERANCE = 1e-8
PIVOT_TOLERANCE = 1e-12


def all_eigenvalues(input_laplacian: Sparse, output_laplacian: Sparse) -> Array:
    """The N - 1 generalised eigenvalues outside the null space, descending.

    Dense: ``C^-1 L_X C^-T`` with ``L_Y + 11^T/N = C C^T``; O(N^3) time, three N x N arrays.
    """
    _check_sizes(input_laplacian, output_laplacian)
    xp_values = _reduced(input_laplacian, output_laplacian)[0]
    values_N = arrays.namespace(xp_values).linalg.eigvalsh(xp_values)
    return arrays.namespace(values_N).flip(values_N)[:-1]


def top_eigenpairs(input_laplacian: Sparse, output_laplacian: Sparse, count: int) -> tuple[Array, Array, float]:
    """The ``count`` largest generalised eigenpairs.

    Dense for N <= 1024; beyond, LOBPCG with the degrees of the output graph as preconditioner, and thick-restart
    Lanczos where that does not converge.

    Args:
        input_laplacian: Laplacian of the input graph, CSR float64.
        output_laplacian: Laplacian of the output graph, CSR float64.
        count: number of pairs, 1 <= count <= N - 1.

    Returns:
        values_K descending, vectors_NK with ``v^T L_Y v = 1`` and ``v`` orthogonal to 1, and the largest residual.

    Raises:
        NumericError: too few neurons, graphs of different sizes, an output graph that is not connected, or a residual
            above 1e-6.
    """
    _check_sizes(input_laplacian, output_laplacian)
    size = input_laplacian.shape[0]
    if not 1 <= count < size:
        raise NumericError(f"{count} eigenpairs asked of {size} neurons; at most {size - 1} exist")
    few = 5 * (count + lobpcg.GUARD_VECTORS) < size - 1
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
    difference_EK = xp.take(vectors_NK, edges_E2[:, 0], axis=0) - xp.take(vectors_NK, edges_E2[:, 1], axis=0)
    return xp.sum(difference_EK * difference_EK * values_K[None, :], axis=1)


def full_distortion_of_edges(input_laplacian: Sparse, output_laplacian: Sparse, edges_E2: Array) -> Array:
    """The edge score over the whole spectrum, without eigenvectors.

    With L_Y-orthonormal eigenvectors ``sum_i zeta_i v_i v_i^T = L_Y^+ L_X L_Y^+ = M``, so the score of edge (p, q) is
    ``M_pp + M_qq - 2 M_pq``. One Cholesky factor, one inverse, one sparse-dense product; float64 [E].
    """
    _check_sizes(input_laplacian, output_laplacian)
    xp = arrays.namespace(edges_E2)
    size = input_laplacian.shape[0]
    factor_NN = _factor(output_laplacian, xp)
    half_NN = arrays.solve_lower(factor_NN, xp.eye(size, dtype=xp.float64))
    pseudo_NN = half_NN.T @ half_NN - 1.0 / size
    product_NN = input_laplacian @ pseudo_NN
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    diagonal_N = xp.sum(pseudo_NN * product_NN, axis=0)
    transposed_NN = xp.asarray(product_NN.T, copy=True)
    blocks = arrays.pieces(left.shape[0], EDGE_BLOCK)
    gathered = (
        (xp.take(pseudo_NN, left[block], axis=0), xp.take(transposed_NN, right[block], axis=0)) for block in blocks
    )
    cross_E = xp.concat([xp.sum(one * other, axis=1) for one, other in gathered])
    return xp.take(diagonal_N, left) + xp.take(diagonal_N, right) - 2 * cross_E


def _check_sizes(input_laplacian: Sparse, output_laplacian: Sparse) -> None:
    left, right = input_laplacian.shape[0], output_laplacian.shape[0]
    if left != right:
        raise NumericError(
            f"an input graph of {left} neurons and an output graph of {right}: both must be over the same neurons; "
            "record the site again"
        )


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
    """LOBPCG, or Lanczos where that did not converge."""
    parts, _ = arrays.component_labels(output_laplacian)
    if parts > 1:
        raise NumericError(f"the output graph is not connected ({parts} components)")
    values_K, vectors_NK = lobpcg.top_eigenpairs(input_laplacian, output_laplacian, count, ITERATIVE_TOLERANCE)
    reached = residual(input_laplacian, output_laplacian, values_K, vectors_NK)
    if not reached <= RESIDUAL_TOLERANCE and lanczos.fits(input_laplacian.shape[0], count):
        return lanczos.top_eigenpairs(input_laplacian, output_laplacian, count, ITERATIVE_TOLERANCE)
    return values_K, vectors_NK
