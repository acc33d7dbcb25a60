"""Neuron graphs: exact k-nearest neighbours, union symmetrisation, connection, Laplacian.

Shapes: N neurons, M observations (tokens), K neighbours, E edges, B rows of a block.
"""

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.errors import NumericError

BLOCK_ROWS = 1024
SPARE_CANDIDATES = 16
RERANK_VALUES = 4_000_000


def nearest_neighbours(signals_NM: Array, k: int) -> Array:
    """The k nearest other neurons of each neuron in Euclidean distance, nearest first.

    ``|x_p - x_q|^2 = |x_p|^2 + |x_q|^2 - 2 x_p . x_q`` by blocked matrix products. The mean over neurons is taken off
    first: distances do not change and the products lose fewer digits to cancellation. Equal distances are ordered by
    index, so duplicates give the same graph on every run.

    Args:
        signals_NM: float32 or float64, one row per neuron.
        k: neighbours per neuron, 1 <= k < N.

    Returns:
        Integer array [N, k].

    Raises:
        NumericError: fewer than k + 1 neurons, or a signal that is not finite.
    """
    xp = arrays.namespace(signals_NM)
    size = signals_NM.shape[0]
    if size <= k:
        raise NumericError(f"{size} neurons are too few for {k} neighbours; lower method.neighbours below {size}")
    if not bool(xp.all(xp.isfinite(signals_NM))):
        raise NumericError(f"{int(xp.sum(~xp.isfinite(signals_NM)))} signal values are NaN or infinite")
    centred_NM = signals_NM - xp.mean(signals_NM, axis=0)
    blocks = [
        _nearest(centred_NM, start, squared_BN, k) for start, squared_BN in _blocks_of_squared_distances(centred_NM)
    ]
    return xp.concat(blocks, axis=0)


def union_edges(neighbours_NK: Array) -> Array:
    """Edges p < q of the union-symmetrised neighbour graph, sorted, each once.

    Args:
        neighbours_NK: neighbours of each neuron.

    Returns:
        Integer array [E, 2].
    """
    xp = arrays.namespace(neighbours_NK)
    size, k = neighbours_NK.shape
    sources = xp.repeat(xp.arange(size, dtype=xp.int64), k)
    targets = xp.astype(xp.reshape(neighbours_NK, (-1,)), xp.int64)
    codes = xp.unique_values(xp.minimum(sources, targets) * size + xp.maximum(sources, targets))
    return xp.stack([codes // size, codes % size], axis=1)


def connect(signals_NM: Array, edges_E2: Array) -> tuple[Array, int]:
    """Join the components of a graph by edges between their closest neurons (Boruvka rounds).

    A disconnected output graph makes generalised eigenvalues infinite; a diagonal shift would only hide it.

    Args:
        signals_NM: signals the graph was built on.
        edges_E2: its edges.

    Returns:
        Edges of the connected graph, and the number of components there were.
    """
    xp = arrays.namespace(signals_NM)
    size = signals_NM.shape[0]
    centred_NM = signals_NM - xp.mean(signals_NM, axis=0)
    count, labels_N = arrays.component_labels(adjacency(edges_E2, size))
    found = count
    while count > 1:
        bridges = _closest_outside(centred_NM, labels_N, count)
        codes = xp.concat([edges_E2[:, 0] * size + edges_E2[:, 1], bridges])
        codes = xp.unique_values(codes)
        edges_E2 = xp.stack([codes // size, codes % size], axis=1)
        count, labels_N = arrays.component_labels(adjacency(edges_E2, size))
    return edges_E2, found


def adjacency(edges_E2: Array, size: int) -> Sparse:
    """Symmetric 0/1 adjacency matrix, float64 CSR [N, N]."""
    xp = arrays.namespace(edges_E2)
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    rows, columns = xp.concat([left, right]), xp.concat([right, left])
    return arrays.csr(xp.ones(rows.shape[0], dtype=xp.float64), rows, columns, size)


def laplacian(edges_E2: Array, size: int) -> Sparse:
    """Unweighted graph Laplacian ``D - A``, float64 CSR [N, N]."""
    xp = arrays.namespace(edges_E2)
    nodes = xp.arange(size, dtype=edges_E2.dtype)
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    rows = xp.concat([left, right, nodes])
    columns = xp.concat([right, left, nodes])
    values = xp.concat([-xp.ones(2 * left.shape[0], dtype=xp.float64), degrees(edges_E2, size)])
    return arrays.csr(values, rows, columns, size)


def degrees(edges_E2: Array, size: int) -> Array:
    """Number of edges at each node, float64 [N]."""
    xp = arrays.namespace(edges_E2)
    return xp.astype(xp.bincount(xp.reshape(edges_E2, (-1,)), minlength=size), xp.float64)


def _blocks_of_squared_distances(centred_NM: Array):  # noqa: ANN202 (generator of (start, array) pairs)
    xp = arrays.namespace(centred_NM)
    size = centred_NM.shape[0]
    norms_N = xp.sum(centred_NM * centred_NM, axis=1)
    for start in range(0, size, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, size)
        scale_BN = norms_N[start:stop, None] + norms_N[None, :]
        squared_BN = scale_BN - 2 * (centred_NM[start:stop] @ centred_NM.T)
        noise = 8 * xp.finfo(squared_BN.dtype).eps  # below it, only rounding would tell duplicates apart
        squared_BN = xp.where(squared_BN <= noise * scale_BN, xp.zeros_like(squared_BN), squared_BN)
        rows = xp.arange(stop - start)
        squared_BN[rows, rows + start] = xp.inf
        yield start, squared_BN


def _nearest(centred_NM: Array, start: int, squared_BN: Array, k: int) -> Array:
    """The k nearest of a block: candidates by matrix product, their order by exact differences."""
    xp = arrays.namespace(squared_BN)
    pool = min(k + SPARE_CANDIDATES, squared_BN.shape[1] - 1)
    candidates_BP = _candidates(squared_BN, pool)
    exact_BP = xp.empty(candidates_BP.shape, dtype=xp.float64)
    rows = max(1, RERANK_VALUES // (pool * centred_NM.shape[1]))
    for first in range(0, candidates_BP.shape[0], rows):
        chosen_RP = candidates_BP[first : first + rows]
        own_R1M = centred_NM[start + first : start + first + chosen_RP.shape[0], None, :]
        difference_RPM = centred_NM[chosen_RP] - own_R1M
        exact_BP[first : first + rows] = xp.sum(difference_RPM * difference_RPM, axis=2, dtype=xp.float64)
    order_BP = xp.argsort(exact_BP, axis=1, stable=True)
    return xp.take_along_axis(candidates_BP, order_BP, axis=1)[:, :k]


def _candidates(squared_BN: Array, pool: int) -> Array:
    """Indices of the ``pool`` smallest of each row, ascending; among equal values the lower indices."""
    xp = arrays.namespace(squared_BN)
    chosen_BP = xp.argpartition(squared_BN, pool - 1, axis=1)[:, :pool]
    largest_B = xp.max(xp.take_along_axis(squared_BN, chosen_BP, axis=1), axis=1)
    tied = xp.nonzero(xp.count_nonzero(squared_BN <= largest_B[:, None], axis=1) > pool)[0]
    if tied.shape[0]:  # a partition picks any of equal values; sorting those rows costs ten times as much
        chosen_BP[tied] = xp.argsort(squared_BN[tied], axis=1, stable=True)[:, :pool]
    return xp.sort(chosen_BP, axis=1)


def _closest_outside(centred_NM: Array, labels_N: Array, count: int) -> Array:
    """For each component the code p * N + q (p < q) of its shortest edge to another component."""
    xp = arrays.namespace(centred_NM)
    size = centred_NM.shape[0]
    best_C = xp.full(count, xp.inf, dtype=centred_NM.dtype)
    codes_C = xp.zeros(count, dtype=xp.int64)
    for start, squared_BN in _blocks_of_squared_distances(centred_NM):
        inside_B = labels_N[start : start + squared_BN.shape[0]]
        outside_BN = xp.where(inside_B[:, None] == labels_N[None, :], xp.inf, squared_BN)
        nearest_B = xp.argmin(outside_BN, axis=1)
        rows_B = xp.arange(squared_BN.shape[0])
        distance_B = outside_BN[rows_B, nearest_B]
        for component in range(count):
            mine = xp.where(inside_B == component, distance_B, xp.inf)
            row = int(xp.argmin(mine))
            if float(mine[row]) < float(best_C[component]):
                best_C[component] = mine[row]
                ends = sorted((start + row, int(nearest_B[row])))
                codes_C[component] = ends[0] * size + ends[1]
    return codes_C
