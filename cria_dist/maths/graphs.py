"""Neuron graphs: union of nearest neighbours, connection, Laplacian.

Shapes: N neurons, M observations (tokens), K neighbours, E edges, B rows of a block, S neurons that seek a way out.
"""

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.maths.points import Points

BLOCK_ROWS = 512


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
    count, labels_N = arrays.component_labels(adjacency(edges_E2, size))
    found = count
    if found == 1:
        return edges_E2, found
    points = Points.of(signals_NM)
    while count > 1:
        codes = xp.concat([edges_E2[:, 0] * size + edges_E2[:, 1], _closest_outside(points, labels_N, count)])
        codes = xp.unique_values(codes)
        edges_E2 = xp.stack([codes // size, codes % size], axis=1)
        count, labels_N = arrays.component_labels(adjacency(edges_E2, size))
    return edges_E2, found


def adjacency(edges_E2: Array, size: int) -> Sparse:
    """Symmetric 0/1 adjacency matrix, float64 CSR [N, N]."""
    xp = arrays.namespace(edges_E2)
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    rows, columns = xp.concat([left, right]), xp.concat([right, left])
    return arrays.csr(xp.ones(rows.shape[0], dtype=xp.float64), rows, columns, (size, size))


def laplacian(edges_E2: Array, size: int, weights_E: Array | None = None) -> Sparse:
    """Graph Laplacian ``D - A``, float64 CSR [N, N]; every edge weighs one unless weights are given."""
    xp = arrays.namespace(edges_E2)
    nodes = xp.arange(size, dtype=edges_E2.dtype)
    left, right = edges_E2[:, 0], edges_E2[:, 1]
    values_E = xp.ones(left.shape[0], dtype=xp.float64) if weights_E is None else weights_E
    degree_N = arrays.totals(xp.repeat(values_E, 2), xp.reshape(edges_E2, (-1,)), size)
    rows = xp.concat([left, right, nodes])
    columns = xp.concat([right, left, nodes])
    return arrays.csr(xp.concat([-values_E, -values_E, degree_N]), rows, columns, (size, size))


def degrees(edges_E2: Array, size: int) -> Array:
    """Number of edges at each node, float64 [N]."""
    xp = arrays.namespace(edges_E2)
    return arrays.totals(xp.ones(2 * edges_E2.shape[0], dtype=xp.float64), xp.reshape(edges_E2, (-1,)), size)


def _closest_outside(points: Points, labels_N: Array, count: int) -> Array:
    """For each component but the largest the code p * N + q (p < q) of its shortest edge to another one.

    These are edges of the minimum spanning tree already; the largest component is joined by the others.
    """
    xp = arrays.namespace(labels_N)
    size = labels_N.shape[0]
    largest = xp.argmax(xp.bincount(labels_N, minlength=count))
    seekers_S = xp.nonzero(labels_N != largest)[0]
    nearest, distance = [], []
    for piece in arrays.pieces(seekers_S.shape[0], BLOCK_ROWS):
        rows_B = seekers_S[piece]
        squared_BN = points.squared_distances(rows_B)
        squared_BN = xp.where(labels_N[rows_B][:, None] == labels_N[None, :], xp.inf, squared_BN)
        nearest.append(xp.argmin(squared_BN, axis=1))
        distance.append(xp.min(squared_BN, axis=1))
    order_S = xp.argsort(xp.concat(distance), stable=True)
    order_S = order_S[xp.argsort(labels_N[seekers_S[order_S]], stable=True)]
    components_S = labels_N[seekers_S[order_S]]
    first = order_S[xp.searchsorted(components_S, xp.unique_values(components_S))]
    one, other = seekers_S[first], xp.concat(nearest)[first]
    return xp.minimum(one, other) * size + xp.maximum(one, other)
