"""The whole generalised spectrum between two graphs, and what a report says of it.

Exact up to 4096 neurons, beyond by stochastic Lanczos quadrature: from a random vector whose parts along all
eigenvectors are alike, a few Lanczos steps give the eigenvalue distribution as seen by that vector.

Source: Ubaru, Chen and Saad, 2017. Shapes: N neurons, P probes, S Lanczos steps, K eigenvalues.
"""

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.maths import pencil
from cria_dist.maths.solve import solve_laplacian
from cria_dist.records import Float64

EXACT_LIMIT = 4096
PROBES = 8
STEPS = 24
SOLVE_TOLERANCE = 1e-8
LOST = 1e-14  # squared length of what a vector in the span of the basis leaves, from unit length


def whole_spectrum(input_laplacian: Sparse, output_laplacian: Sparse, output_edges_E2: Array) -> tuple[Float64, bool]:
    """All N - 1 eigenvalues of ``L_X v = zeta L_Y v`` outside the null space, descending, and whether they are exact.

    Estimated ones are the quantiles of the estimated distribution.

    Args:
        input_laplacian: Laplacian of the input graph, CSR float64.
        output_laplacian: Laplacian of the connected output graph, CSR float64.
        output_edges_E2: edges of the output graph.
    """
    size = input_laplacian.shape[0]
    if size <= EXACT_LIMIT:
        return arrays.to_numpy(pencil.all_eigenvalues(input_laplacian, output_laplacian)), True
    nodes_PS, weights_PS = quadrature(input_laplacian, output_laplacian, output_edges_E2)
    order = np.argsort(-nodes_PS, axis=None)
    nodes, weights = nodes_PS.ravel()[order], weights_PS.ravel()[order]
    middle = (np.cumsum(weights) - weights / 2) / weights.sum()
    return np.interp((np.arange(size - 1) + 0.5) / (size - 1), middle, nodes), False


def quadrature(input_laplacian: Sparse, output_laplacian: Sparse, output_edges_E2: Array) -> tuple[Float64, Float64]:
    """Nodes and weights whose sums over a function are near N - 1 times its mean over the eigenvalues, [P, S] each.

    A probe is ``L_Y^+ B_Y^T s`` with random signs s on the edges of Y: its parts along the L_Y-orthonormal eigenvectors
    are uncorrelated and of unit variance.
    """
    xp = arrays.namespace(output_edges_E2)
    size, count = output_laplacian.shape[0], output_edges_E2.shape[0]
    ones_E, numbers = xp.ones(count, dtype=xp.float64), xp.arange(count)
    ends = xp.concat([output_edges_E2[:, 0], output_edges_E2[:, 1]])
    incidence = arrays.csr(xp.concat([ones_E, -ones_E]), ends, xp.concat([numbers, numbers]), (size, count))
    signs_EP = xp.asarray(2.0 * np.random.default_rng(0).integers(0, 2, size=(count, PROBES)) - 1)
    probe_NP = solve_laplacian(output_laplacian, incidence @ signs_EP, SOLVE_TOLERANCE)
    diagonal_PS, beside_PS = _tridiagonal(input_laplacian, output_laplacian, probe_NP)
    steps = diagonal_PS.shape[1]
    matrix_PSS = np.zeros((PROBES, steps, steps))
    place = np.arange(steps)
    matrix_PSS[:, place, place] = diagonal_PS
    matrix_PSS[:, place[1:], place[:-1]] = matrix_PSS[:, place[:-1], place[1:]] = beside_PS[:, :-1]
    nodes_PS, vectors_PSS = np.linalg.eigh(matrix_PSS)
    return nodes_PS, (size - 1) / PROBES * vectors_PSS[:, 0, :] ** 2


def _tridiagonal(left: Sparse, right: Sparse, probe_NP: Array) -> tuple[Float64, Float64]:
    """Diagonal and subdiagonal of one Lanczos run per probe with ``L_Y^+ L_X``, orthogonalised in full."""
    xp = arrays.namespace(probe_NP)
    basis: list[tuple[Array, Array]] = []
    diagonal, beside = [], []
    image_NP = right @ probe_NP
    for _ in range(min(STEPS, probe_NP.shape[0] - 1)):
        length_P = xp.sqrt(_positive(xp.sum(probe_NP * image_NP, axis=0)))
        safe_P = xp.where(length_P > 0, length_P, 1.0)
        basis.append((probe_NP / safe_P, image_NP / safe_P))
        mapped_NP = left @ basis[-1][0]
        diagonal.append(xp.sum(basis[-1][0] * mapped_NP, axis=0))
        probe_NP = solve_laplacian(right, mapped_NP, SOLVE_TOLERANCE)
        for _ in range(2):
            for vector_NP, dual_NP in basis:
                probe_NP = probe_NP - xp.sum(probe_NP * dual_NP, axis=0) * vector_NP
        image_NP = right @ probe_NP
        beside.append(xp.sqrt(_positive(xp.sum(probe_NP * image_NP, axis=0))))
    return arrays.to_numpy(xp.stack(diagonal, axis=1)), arrays.to_numpy(xp.stack(beside, axis=1))


def _positive(squared_P: Array) -> Array:
    """Squared lengths; what is left of a vector inside the basis is zero but for rounding."""
    xp = arrays.namespace(squared_P)
    return xp.where(squared_P > LOST, squared_P, 0.0)


def with_top(values_K: Float64, top_J: Float64) -> Float64:
    """A whole spectrum with its largest values, descending, replaced by ones known better."""
    rest_K = np.minimum(values_K[top_J.size :], top_J[-1])
    return np.concatenate([top_J, rest_K])


def effective_rank(values_K: Float64) -> float:
    """``exp(H)`` of the eigenvalues divided by their sum (Roy and Vetterli, 2007); between 1 and their number."""
    share_K = values_K[values_K > 0] / values_K[values_K > 0].sum()
    return float(np.exp(-np.sum(share_K * np.log(share_K))))


def spectral_gap(values_K: Float64) -> float:
    """``1 - zeta_2 / zeta_1`` of descending eigenvalues: how far the dominant one stands out; 0 for one value."""
    return float(1 - values_K[1] / values_K[0]) if values_K.size > 1 else 0.0
