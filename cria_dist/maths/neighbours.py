"""Exact k nearest neighbours by blocked matrix products, each pair of blocks multiplied once.

A product in working precision finds a pool of candidates for each neuron; where its rounding could hide the truth, the
candidates are compared in float64. No N x N array: B rows at a time, and a pool per neuron.

Shapes: N neurons, M observations, K neighbours, P candidates in a pool, B rows of a block, Q pairs of neurons.
"""

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.errors import NumericError
from cria_dist.maths import duplicates
from cria_dist.maths.points import Points

BLOCK_ROWS = 512
LONG_SIGNALS = 2048  # from here on tiles of twice the height are 10 % faster, below as much slower
BLOCK_COLUMNS = 8192
LIMIT_ROWS = 512
SPARE_CANDIDATES = 8
UINT16_VALUES = 2**16
Found = tuple[Array, Array, Array]
"""Two neurons and their squared distance, for each pair [Q]."""


def nearest_neighbours(signals_NM: Array, k: int) -> Array:
    """The k nearest other neurons of each neuron in Euclidean distance, nearest first, equal distances by index.

    Args:
        signals_NM: float32 or float64, one row per neuron.
        k: neighbours per neuron, 1 <= k < N.

    Returns:
        Integer array [N, k].

    Raises:
        NumericError: fewer than k + 1 neurons, a signal that is not finite, or all signals equal.
    """
    xp = arrays.namespace(signals_NM)
    size = signals_NM.shape[0]
    if size <= k:
        raise NumericError(f"{size} neurons are too few for {k} neighbours; lower method.neighbours below {size}")
    if not bool(xp.all(xp.isfinite(signals_NM))):
        bad = int(xp.sum(xp.astype(~xp.isfinite(signals_NM), xp.int64)))
        raise NumericError(f"{bad} signal values are NaN or infinite; look at the recorded activations")
    points = Points.of(signals_NM)
    distinct_U, owner_N = duplicates.distinct_rows(signals_NM, points.key_N)
    if distinct_U.shape[0] == size:
        return _nearest_distinct(points, k)[1]
    if distinct_U.shape[0] == 1:
        raise NumericError(f"all {size} neurons have the same signals; record more tokens or exclude this layer")
    chosen = Points.of(xp.take(signals_NM, distinct_U, axis=0))
    values_UK, nearest_UK = _nearest_distinct(chosen, min(k, distinct_U.shape[0] - 1))
    return duplicates.with_copies(values_UK, nearest_UK, owner_N, k)


def _nearest_distinct(points: Points, k: int) -> tuple[Array, Array]:
    """Squared distances (equal only when exactly equal) and indices of the k nearest, no two points being the same."""
    xp = arrays.namespace(points.norm_N)
    size = points.norm_N.shape[0]
    values_NP, index_NP = _pools(points, min(k + SPARE_CANDIDATES, size - 1))
    last = min(k, values_NP.shape[1] - 1)
    error_NP = points.error(values_NP[:, : last + 1], xp.arange(size))
    gaps_N = values_NP[:, 1 : last + 1] - values_NP[:, :last] - error_NP[:, 1:] - error_NP[:, :-1]
    unsure_N = xp.any(gaps_N <= 0, axis=1)
    values_NK, index_NK = xp.astype(values_NP[:, :k], xp.float64), index_NP[:, :k]
    unsure = xp.nonzero(unsure_N)[0]
    if unsure.shape[0]:
        settled = _settle(points, k, unsure, (values_NP[:, -1], index_NP))
        place_N = xp.cumulative_sum(xp.astype(unsure_N, xp.int64)) - 1
        place_N = xp.where(unsure_N, place_N, xp.zeros_like(place_N))
        values_NK, index_NK = (
            xp.where(unsure_N[:, None], xp.take(new, place_N, axis=0), old)
            for new, old in zip(settled, (values_NK, index_NK), strict=True)
        )
    return values_NK, index_NK


def _pools(points: Points, pool: int) -> tuple[Array, Array]:
    """The ``pool`` nearest of each neuron by working precision, nearest first: squared distances and indices [N, P].

    The distances to the first neurons give each one a limit that few of the later ones fall below.
    """
    xp = arrays.namespace(points.norm_N)
    size = points.norm_N.shape[0]
    values_NP = xp.full((size, pool), xp.inf, dtype=points.norm_N.dtype)
    index_NP = xp.zeros((size, pool), dtype=xp.int64)
    limit_N = xp.full((size,), xp.inf, dtype=points.norm_N.dtype)
    height = BLOCK_ROWS if points.centred_NM.shape[1] < LONG_SIGNALS else 2 * BLOCK_ROWS
    for rows in arrays.pieces(size, height):
        start, stop = rows.start, rows.stop
        later = arrays.pieces(size - stop, BLOCK_COLUMNS)
        found: list[Found] = []
        for columns in (rows, *(slice(stop + piece.start, stop + piece.stop) for piece in later)):
            tile_BW = points.tile(rows, columns)
            if columns == rows:
                xp.reshape(tile_BW, (-1,), copy=False)[:: stop - start + 1] = xp.inf  # not its own neighbour
            if start == 0 and stop > pool:
                limit_N[columns] = _first_limit(points, tile_BW, columns, pool)
            found.append(_below(tile_BW, limit_N[rows][:, None], (start, columns.start)))
            if columns != rows:
                owner, far, value = _below(tile_BW, limit_N[columns][None, :], (start, columns.start))
                found.append((far, owner, value))
        merged = _merge(values_NP[start:, :], index_NP[start:, :], found, start)
        values_NP[start:, :], index_NP[start:, :] = merged
        limit_N = xp.asarray(values_NP[:, -1], copy=True)
    return values_NP, index_NP


def _first_limit(points: Points, tile_BW: Array, columns: slice, pool: int) -> Array:
    """The P-th smallest distance of each neuron of the columns to some of the first neurons."""
    xp = arrays.namespace(tile_BW)
    count = min(tile_BW.shape[0], max(LIMIT_ROWS, pool + 1))
    symmetric = columns.start == 0
    # sorting rows is faster, even after a copy
    sample_WS = tile_BW[:, :count] if symmetric else xp.asarray(tile_BW[:count, :].T, copy=True)
    limit_W1 = xp.sort(sample_WS, axis=1, stable=False)[:, pool - 1 : pool]
    return (limit_W1 + 2 * points.error(limit_W1, xp.arange(columns.start, columns.stop)))[:, 0]


def _below(tile_BW: Array, limit: Array, corner: tuple[int, int]) -> Found:
    """Entries of a tile within the limit of their row or column: neuron of the row, of the column, and value."""
    xp = arrays.namespace(tile_BW)
    flat = xp.nonzero(xp.reshape(tile_BW <= limit, (-1,)))[0]
    width = tile_BW.shape[1]
    return flat // width + corner[0], flat % width + corner[1], xp.take(xp.reshape(tile_BW, (-1,)), flat)


def _merge(values_WP: Array, index_WP: Array, found: list[Found], start: int) -> tuple[Array, Array]:
    """The P smallest of each neuron's pool and what was found for it, ascending; W neurons from ``start`` on."""
    xp = arrays.namespace(values_WP)
    size, pool = values_WP.shape
    owner_Q, far_Q, value_Q = (xp.concat(parts) for parts in zip(*found, strict=True))
    owner_Q = xp.concat([xp.repeat(xp.arange(size), pool), owner_Q - start])
    owner_Q = xp.astype(owner_Q, xp.uint16 if size < UINT16_VALUES else xp.int64)  # short numbers sort faster
    far_Q = xp.concat([xp.reshape(index_WP, (-1,)), far_Q])
    value_Q = xp.concat([xp.reshape(values_WP, (-1,)), value_Q])
    order_Q = xp.argsort(value_Q, stable=False)
    order_Q = xp.take(order_Q, xp.argsort(xp.take(owner_Q, order_Q), stable=True))
    first_W = xp.searchsorted(xp.take(owner_Q, order_Q), xp.arange(size, dtype=owner_Q.dtype))
    chosen = xp.take(order_Q, xp.reshape(first_W[:, None] + xp.arange(pool)[None, :], (-1,)))
    return xp.reshape(xp.take(value_Q, chosen), (size, pool)), xp.reshape(xp.take(far_Q, chosen), (size, pool))


def _settle(points: Points, k: int, unsure: Array, pools: tuple[Array, Array]) -> tuple[Array, Array]:
    """The k nearest of the neurons whose order the working precision leaves open, in float64, ties by index."""
    xp = arrays.namespace(unsure)
    last_N, index_NP = pools
    index_RP = xp.sort(xp.take(index_NP, unsure, axis=0), axis=1)
    count, pool = index_RP.shape
    exact_RP = xp.reshape(points.exact(xp.repeat(unsure, pool), xp.reshape(index_RP, (-1,))), (count, pool))
    order_RK = xp.argsort(exact_RP, axis=1, stable=True)[:, :k]
    values_RK = xp.take_along_axis(exact_RP, order_RK, axis=1)
    index_RK = xp.take_along_axis(index_RP, order_RK, axis=1)
    if pool == points.norm_N.shape[0] - 1:
        return values_RK, index_RK
    last_R1 = xp.take(last_N, unsure)[:, None]
    safe_R1 = last_R1 - points.error(last_R1, unsure)
    for row in arrays.to_numpy(xp.nonzero(values_RK[:, -1] >= safe_R1[:, 0])[0]).tolist():
        values_Q, index_Q = _search(points, unsure[row : row + 1], values_RK[row, -1:])
        values_RK[row, :], index_RK[row, :] = values_Q[:k], index_Q[:k]
    return values_RK, index_RK


def _search(points: Points, neuron_1: Array, limit_1: Array) -> tuple[Array, Array]:
    """The nearest of one neuron among all whose true squared distance may be within the limit."""
    xp = arrays.namespace(neuron_1)
    squared_N = points.squared_distances(neuron_1)[0, :]
    reach = limit_1 + 2 * points.error(limit_1[:, None], neuron_1)[0, :]
    near_Q = xp.nonzero((squared_N <= reach) & (xp.arange(squared_N.shape[0]) != neuron_1))[0]
    exact_Q = points.exact(xp.repeat(neuron_1, near_Q.shape[0]), near_Q)
    order_Q = xp.argsort(exact_Q, stable=True)
    return xp.take(exact_Q, order_Q), xp.take(near_Q, order_Q)
