"""What the spectral benchmark measures: a synthetic layer, its graphs, its whole site, and the memory that takes."""

import math
import tracemalloc
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.maths import graphs, importance, neighbours, pencil
from cria_dist.records import Float64
from jobs.benchmarks.frame import seconds

Float32 = NDArray[np.float32]
NEIGHBOURS, PAIRS, FACTORS = 10, 16, 40


class Cost(NamedTuple):
    """Seconds of a call, and the peak of what it allocated in GiB."""

    seconds: float
    gib: float


def before(width: int, tokens: int, seed: int = 0) -> Float32:
    """Pre-activation signals of a synthetic layer, float32 [width, tokens]."""
    rng = np.random.default_rng(seed)
    mixing = (rng.standard_t(5, size=(width, FACTORS)) / math.sqrt(FACTORS)).astype(np.float32)
    gain = np.exp(0.5 * rng.standard_normal((width, 1), dtype=np.float32))
    pre = mixing @ rng.standard_t(5, size=(FACTORS, tokens)).astype(np.float32)
    pre += 0.5 * rng.standard_normal((width, tokens), dtype=np.float32) - np.float32(0.5)
    pre *= gain
    return pre


def after(pre: Float32) -> Float32:
    """Their SiLU."""
    return np.asarray(pre / 2 * (1 + np.tanh(pre / 2)), dtype=np.float32)


def signals(width: int, tokens: int, seed: int = 0) -> tuple[Float32, Float32]:
    """Pre- and post-activation signals."""
    pre = before(width, tokens, seed)
    return pre, after(pre)


def graph(signals_NM: Array, k: int = NEIGHBOURS) -> Array:
    """Edges of the connected neighbour graph."""
    return graphs.connect(signals_NM, graphs.union_edges(neighbours.nearest_neighbours(signals_NM, k)))[0]


def site(pair: tuple[Array, Array], k: int = NEIGHBOURS) -> tuple[Float64, float]:
    """Graphs, eigenpairs, node scores on the host; and the residual."""
    edges = [graph(one, k) for one in pair]
    size = pair[0].shape[0]
    left, right = (graphs.laplacian(one, size) for one in edges)
    values, vectors, residual = pencil.top_eigenpairs(left, right, PAIRS)
    edge_scores = pencil.distortion_of_edges(values, vectors, edges[0])
    return arrays.to_numpy(importance.mean_over_neighbours(edge_scores, edges[0], size)), residual


def cost(action: Callable[[], object]) -> Cost:
    """Time a call and find the peak of the arrays it makes (tracemalloc; it costs a few percent of the time)."""
    tracemalloc.start()
    taken = seconds(action)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Cost(taken, peak / 2**30)
