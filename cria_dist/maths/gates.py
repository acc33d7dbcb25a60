"""Gates on units: the bounded one and what it costs to be open, a penalty on plain factors.

Every function takes the learned numbers of N units in any array library, among them torch's, whose gradients pass
through. Logarithms of the sigmoid are never taken of the sigmoid: that is 0 below -104 in float32.
"""

from cria_dist import arrays
from cria_dist.arrays import Array


def sigmoid(learned_N: Array) -> Array:
    """``1 / (1 + exp(-w))``, in (0, 1)."""
    return arrays.namespace(learned_N).exp(log_sigmoid(learned_N))


def log_sigmoid(learned_N: Array) -> Array:
    """``ln sigmoid(w) = -ln(1 + exp(-w))``, finite for every finite w."""
    xp = arrays.namespace(learned_N)
    return -xp.logaddexp(xp.zeros_like(learned_N), -learned_N)


def receding_penalty(learned_N: Array, shift: float) -> Array:
    """``R = sum_i s_i (1 - ln s_i)`` with ``s = sigmoid(w + shift)``.

    ``dR/dw = -ln(s) s (1 - s)`` is largest at s = 0.236 (there 0.260) and fades on both sides: units that matter are
    let go, units that have gone stay where they are. R lies between 0 and 1 per unit.

    Args:
        learned_N: what the sigmoid is taken of, [N].
        shift: moves the strongest push to smaller gates (``b`` of the paper).

    Returns:
        A single number.

    *Source:* arXiv 2204.06404, and ``rni_loss`` of the authors' code.
    """
    log_N = log_sigmoid(learned_N + shift)
    xp = arrays.namespace(learned_N)
    return xp.sum(xp.exp(log_N) * (1 - log_N))


def elastic_penalty(learned_N: Array, l1: float, l2: float) -> Array:
    """``l1 sum_i |w_i| + l2 sum_i w_i^2``, a single number."""
    xp = arrays.namespace(learned_N)
    return l1 * xp.sum(xp.abs(learned_N)) + l2 * xp.sum(learned_N * learned_N)
