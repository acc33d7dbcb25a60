"""Systems with a graph Laplacian by conjugate gradients, many right-hand sides at once.

Graphs of nearest neighbours in many dimensions are expanders: with the degrees as preconditioner some twenty iterations
do, where a factorisation fills in completely.

Shapes: N neurons, K right-hand sides.
"""

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.errors import NumericError

MAX_ITERATIONS = 2000


def solve_laplacian(laplacian: Sparse, right_NK: Array, tolerance: float) -> Array:
    """``L^+ B`` by block conjugate gradients, preconditioned with the degrees.

    Args:
        laplacian: of a connected graph, CSR float64.
        right_NK: right-hand sides, float64; their part along the constant vector is dropped.
        tolerance: on the residual norm relative to the right-hand side, for every column.

    Returns:
        Solutions orthogonal to the constant vector, float64 [N, K].

    Raises:
        NumericError: not converged after 2000 iterations, which a connected graph of neighbours does not do.
    """
    xp = arrays.namespace(right_NK)
    inverse_N1 = 1 / arrays.diagonal(laplacian)[:, None]
    error_NK = right_NK - xp.mean(right_NK, axis=0)
    limit_K = tolerance * xp.linalg.vector_norm(error_NK, axis=0)
    solution_NK = xp.zeros_like(error_NK)
    scaled_NK = inverse_N1 * error_NK
    direction_NK = scaled_NK
    product_K = xp.sum(error_NK * scaled_NK, axis=0)
    for _ in range(MAX_ITERATIONS):
        size_K = xp.linalg.vector_norm(error_NK, axis=0)
        if bool(xp.all(size_K <= limit_K)):
            return solution_NK - xp.mean(solution_NK, axis=0)
        image_NK = laplacian @ direction_NK
        energy_K = xp.sum(direction_NK * image_NK, axis=0)
        step_K = xp.where(energy_K > 0, product_K / xp.where(energy_K > 0, energy_K, 1.0), 0.0)
        solution_NK = solution_NK + step_K * direction_NK
        error_NK = error_NK - step_K * image_NK
        scaled_NK = inverse_N1 * error_NK
        previous_K, product_K = product_K, xp.sum(error_NK * scaled_NK, axis=0)
        ratio_K = xp.where(previous_K > 0, product_K / xp.where(previous_K > 0, previous_K, 1.0), 0.0)
        direction_NK = scaled_NK + ratio_K * direction_NK
    raise NumericError(
        f"conjugate gradients did not converge in {MAX_ITERATIONS} iterations on {laplacian.shape[0]} neurons; the "
        "output graph is not connected or one long chain: raise method.neighbours or record more tokens"
    )
