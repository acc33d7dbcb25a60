"""What is added to the diagonal of a Gram matrix before it is inverted."""

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array


def added_ridge(gram_NN: Array, mean: float, ridge: float) -> float:
    """``ridge`` times the mean of the diagonal, and for a ridge below 1 no more than the median of what is not zero.

    One massive signal (Sun et al., https://arxiv.org/abs/2402.17762) can make the mean thousands of times the energy
    of any other: in SmolLM2-135M's layer 11 it is 650 times the median, and with that signal ten times as large a ridge
    by the mean alone doubled the error of what is left.

    Args:
        gram_NN: finite Gram matrix.
        mean: of its diagonal.
        ridge: relative, > 0.

    Returns:
        The ridge in the units of the diagonal; 1 if that is zero.
    """
    if mean <= 0:
        return 1.0
    diagonal_N = arrays.to_numpy(arrays.namespace(gram_NN).linalg.diagonal(gram_NN))
    return min(ridge * mean, max(ridge, 1.0) * float(np.median(diagonal_N[diagonal_N > 0])))
