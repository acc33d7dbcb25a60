"""Quadratic forms of ``L_Y^+ L_X L_Y^+`` on edges by random projection, without an N x N array.

With the incidence matrix B of the weighted edges of X and random signs Q the rows of
``Y = L_Y^+ B^T W^(1/2) Q / sqrt t`` have ``E |Y_p - Y_q|^2 = e_pq^T L_Y^+ L_X L_Y^+ e_pq`` (Johnson-Lindenstrauss;
Spielman and Srivastava, 2008). The same signs with ``D_Y^-1`` in place of ``L_Y^+`` give a number whose expectation is
known in closed form; both err alike, so their ratio corrects most of the error.

Shapes: N neurons, E edges, T projections at a time.
"""

import math

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.maths.solve import solve_laplacian

PROJECTIONS = 1024  # rank correlation of node scores with the exact ones above 0.999
BLOCK_COLUMNS = 64
TOLERANCE = 1e-5


def distortion_of_edges(
    edges_E2: Array, weights_E: Array, output_laplacian: Sparse, projections: int = PROJECTIONS
) -> Array:
    """``e_pq^T L_Y^+ L_X L_Y^+ e_pq`` for each edge (p, q) of X, float64 [E].

    Args:
        edges_E2: edges of the graph X.
        weights_E: their weights, float64; with ones this is the full-spectrum score of an edge.
        output_laplacian: Laplacian of the connected graph Y, CSR float64. With Y = X the result is the effective
            resistance of the edge.
        projections: random directions; the error of an edge falls like 1 / sqrt(projections).

    Raises:
        NumericError: the systems with L_Y did not converge.
    """
    xp = arrays.namespace(weights_E)
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    size, count = output_laplacian.shape[0], left.shape[0]
    roots_E, numbers = xp.sqrt(weights_E), xp.arange(count)
    incidence = arrays.csr(
        xp.concat([roots_E, -roots_E]), xp.concat([left, right]), xp.concat([numbers, numbers]), (size, count)
    )
    degree_N = arrays.diagonal(output_laplacian)
    generator = np.random.default_rng(0)
    found_E, rough_E = xp.zeros(count, dtype=xp.float64), xp.zeros(count, dtype=xp.float64)
    for _ in range(math.ceil(projections / BLOCK_COLUMNS)):
        signs = generator.integers(0, 2, size=(count, BLOCK_COLUMNS), dtype=np.int8)
        signs_ET = 2 * xp.astype(xp.asarray(signs), xp.float64) - 1
        right_NT = incidence @ signs_ET
        found_E += _squared_differences(solve_laplacian(output_laplacian, right_NT, TOLERANCE), left, right)
        rough_E += _squared_differences(right_NT / degree_N[:, None], left, right)
    return found_E / rough_E * _rough(degree_N, edges_E2, weights_E)


def _squared_differences(values_NT: Array, left_E: Array, right_E: Array) -> Array:
    xp = arrays.namespace(values_NT)
    difference_ET = xp.take(values_NT, left_E, axis=0) - xp.take(values_NT, right_E, axis=0)
    difference_ET *= difference_ET
    return xp.sum(difference_ET, axis=1)


def _rough(degree_N: Array, edges_E2: Array, weights_E: Array) -> Array:
    """``e_pq^T D_Y^-1 L_X D_Y^-1 e_pq``, exact."""
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    xp = arrays.namespace(weights_E)
    ends = xp.reshape(edges_E2, (-1,))
    input_degree_N = arrays.totals(xp.repeat(weights_E, 2), ends, degree_N.shape[0])
    share_N = input_degree_N / (degree_N * degree_N)
    product_E = xp.take(degree_N, left) * xp.take(degree_N, right)
    return xp.take(share_N, left) + xp.take(share_N, right) + 2 * weights_E / product_E
