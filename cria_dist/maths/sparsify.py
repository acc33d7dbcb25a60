"""Spectral sparsification of a neighbour graph: drop the edges that the others stand in for.

Source: the graph learning behind SPADE and SAGMAN. With weights ``w = 1 / d^2`` an edge has the spectral distortion
``eta = w R_eff``, its effective resistance over its data distance; edges with a small eta are redundant.

Shapes: N neurons, E edges.
"""

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.maths import graphs, sketch
from cria_dist.maths.points import Points

PROJECTIONS = 256
SMALLEST_SHARE = 1e-6  # of the median of the squared distances that are not 0: duplicates would have infinite weight


def edge_distortion(signals_NM: Array, edges_E2: Array) -> Array:
    """``eta = R_eff / d^2`` of each edge in the graph weighted by ``1 / d^2``, float64 [E]; estimated, sum near N - 1.

    Args:
        signals_NM: signals the graph was built on; not all equal, so that some edge joins different ones.
        edges_E2: edges of a connected graph.
    """
    xp = arrays.namespace(signals_NM)
    squared_E = Points.of(signals_NM).exact(edges_E2[:, 0], edges_E2[:, 1])
    positive = xp.sort(squared_E[squared_E > 0])
    weights_E = 1 / xp.maximum(squared_E, SMALLEST_SHARE * positive[positive.shape[0] // 2])
    laplacian = graphs.laplacian(edges_E2, signals_NM.shape[0], weights_E)
    return weights_E * sketch.distortion_of_edges(edges_E2, weights_E, laplacian, PROJECTIONS)


def sparsify(signals_NM: Array, edges_E2: Array, share: float) -> Array:
    """Drop a share of the edges, those with the smallest distortion, but keep a spanning tree of the largest.

    Args:
        signals_NM: signals the graph was built on.
        edges_E2: edges of a connected graph.
        share: share of the edges to drop, 0 < share < 1; fewer go where the tree needs them.

    Returns:
        Edges that stay, in their order.
    """
    xp = arrays.namespace(signals_NM)
    eta_E = edge_distortion(signals_NM, edges_E2)
    count = eta_E.shape[0]
    rank_E = xp.argsort(xp.argsort(eta_E, stable=True), stable=True)
    tree_E = arrays.smallest_spanning_tree(xp.astype(count - rank_E, xp.float64), edges_E2, signals_NM.shape[0])
    return edges_E2[(rank_E >= int(share * count)) | tree_E]
