"""How far hidden states turn. Shapes: T tokens, D hidden."""

from cria_dist import arrays
from cria_dist.arrays import Array


def cosine_sum(before_TD: Array, after_TD: Array) -> tuple[float, int]:
    """Sum over tokens of the cosine between two states, and the number of tokens it is over; float64.

    A state of length zero has no direction: its token counts neither way.
    """
    xp = arrays.namespace(before_TD)
    before_TD, after_TD = xp.astype(before_TD, xp.float64), xp.astype(after_TD, xp.float64)
    lengths_T = xp.sqrt(xp.sum(before_TD * before_TD, axis=1) * xp.sum(after_TD * after_TD, axis=1))
    product_T = xp.sum(before_TD * after_TD, axis=1)
    turned_T = lengths_T > 0
    cosine_T = xp.where(turned_T, product_T / xp.where(turned_T, lengths_T, 1.0), 0.0)
    return float(xp.sum(cosine_T)), int(xp.sum(xp.astype(turned_T, xp.int64)))
