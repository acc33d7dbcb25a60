"""Neurons as points: squared distances by matrix products, their error, and exact ones.

Shapes: N neurons, M observations, B neurons of a block, W neurons on the other side, Q pairs of neurons.
"""

import math
from dataclasses import dataclass
from typing import Self

from cria_dist import arrays
from cria_dist.arrays import Array

NORM_ROWS = 512


@dataclass(frozen=True, slots=True)
class Points:
    """Neurons as points.

    Attributes:
        signals_NM: as given.
        centred_NM: without their mean over neurons; distances are the same and products lose fewer digits.
        key_N: squared norms of the centred points, float64; equal for equal rows.
        norm_N: the same in the precision of the signals.
        noise: bound of the rounding error of a squared distance, relative to the squared norms of its two points.
    """

    signals_NM: Array
    centred_NM: Array
    key_N: Array
    norm_N: Array
    noise: float

    @classmethod
    def of(cls, signals_NM: Array) -> Self:
        """Centre and measure; the rounding of a product of M terms grows like sqrt(M) (Higham and Mary, 2019)."""
        xp = arrays.namespace(signals_NM)
        centred_NM = signals_NM - xp.mean(signals_NM, axis=0)[None, :]
        blocks = (centred_NM[piece, :] for piece in arrays.pieces(signals_NM.shape[0], NORM_ROWS))
        key_N = xp.concat([xp.sum(block * block, axis=1, dtype=xp.float64) for block in blocks])
        noise = float(xp.finfo(signals_NM.dtype).eps) * max(8.0, math.sqrt(signals_NM.shape[1]) / 2)
        return cls(signals_NM, centred_NM, key_N, xp.astype(key_N, signals_NM.dtype), noise)

    def squared_distances(self, rows: Array) -> Array:
        """Squared distances of some neurons [B] to all, by a matrix product; rounding may go below 0."""
        xp = arrays.namespace(self.norm_N)
        product_BN = xp.take(self.centred_NM, rows, axis=0) @ self.centred_NM.T
        return self._squared(product_BN, xp.take(self.norm_N, rows), self.norm_N)

    def tile(self, own: slice, other: slice) -> Array:
        """The same between two runs of neurons; NumPy multiplies a run with itself in half the operations."""
        own_BM = self.centred_NM[own, :]
        return self._squared(own_BM @ self.centred_NM[other, :].T, self.norm_N[own], self.norm_N[other])

    @staticmethod
    def _squared(product_BW: Array, norm_B: Array, norm_W: Array) -> Array:
        product_BW *= -2
        product_BW += norm_W[None, :]
        product_BW += norm_B[:, None]
        return product_BW

    def error(self, squared: Array, rows: Array) -> Array:
        """Bound of the error of squared distances [B, ...] of some neurons: ``|y|^2 <= 2 |x|^2 + 2 |x - y|^2``."""
        xp = arrays.namespace(squared)
        return self.noise * (3 * xp.take(self.norm_N, rows)[:, None] + 2 * xp.abs(squared))

    def exact(self, left_Q: Array, right_Q: Array) -> Array:
        """Squared distances of pairs by differences in float64 [Q]."""
        xp = arrays.namespace(self.signals_NM)
        count = max(1, arrays.values_at_a_time(self.signals_NM) // self.signals_NM.shape[1])
        parts = []
        for piece in arrays.pieces(left_Q.shape[0], count):
            ends = (xp.take(self.signals_NM, side_Q[piece], axis=0) for side_Q in (left_Q, right_Q))
            left_CM, right_CM = (xp.astype(end, xp.float64) for end in ends)
            left_CM -= right_CM
            parts.append(xp.sum(left_CM * left_CM, axis=1))
        return xp.concat(parts)
