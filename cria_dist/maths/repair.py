"""What the surviving output weights do for the removed units.

Shapes: D outputs of the next linear map, N units, S surviving, R removed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.errors import NumericError
from cria_dist.maths.ridge import added_ridge
from cria_dist.records import Float64, Moments

RIDGES = (1e5, 1e4, 1e3, 1e2, 1e1, 1.0)
"""Times the given one, that are tried on held-out tokens in this order, as long as they predict them better."""


def least_squares(
    weight_DN: Float64, moments: Moments, kept_S: NDArray[np.int64], ridge: float, library: arrays.Library = "numpy"
) -> Float64:
    """Re-solve the surviving columns of the output projection: ``min |A W^T - A_S V^T|^2`` over tokens.

    ``V = W[:, S] + W[:, R] G[R, S] (G[S, S] + r I)^-1`` with the Gram matrix ``G = A^T A`` of the post-activation
    signals and ``r = ridge * mean(diag G[S, S])``. The ridge pulls towards the unrepaired weights, so that directions
    the calibration tokens never excite keep what they had.

    Args:
        weight_DN: output projection, one column per unit.
        moments: moments of the post-activation signals over the calibration tokens.
        kept_S: indices of the surviving units.
        ridge: relative ridge, > 0.
        library: which one solves.

    Returns:
        New columns of the surviving units, float64 [D, S].

    Raises:
        NumericError: the Gram matrix is not finite.
    """
    if not np.isfinite(moments.gram_NN).all():
        raise NumericError("the Gram matrix has NaN or infinite entries; look at the recorded activations")
    removed_R = np.setdiff1d(np.arange(weight_DN.shape[1]), kept_S)
    gram_RS = moments.gram_NN[np.ix_(removed_R, kept_S)]
    gram_SS = arrays.to_device(moments.gram_NN[np.ix_(kept_S, kept_S)], library)
    lost_SD = arrays.to_device((weight_DN[:, removed_R] @ gram_RS).T, library)
    return weight_DN[:, kept_S] + arrays.to_numpy(_solved(gram_SS, lost_SD, ridge)).T


@dataclass(frozen=True, slots=True)
class Products:
    """Sums of products over tokens: of signals A with each other, and with a target T; ``a + b`` covers both sets.

    Attributes:
        gram_SS: ``A^T A``, float64, NumPy or CuPy.
        cross_SD: ``A^T T``, float64.
    """

    gram_SS: Array
    cross_SD: Array

    def __add__(self, other: "Products") -> "Products":
        """Merge two disjoint sets of tokens."""
        return Products(self.gram_SS + other.gram_SS, self.cross_SD + other.cross_SD)

    def unexplained(self, weight_DS: Array) -> Array:
        """``A^T (T - A W^T)``, [S, D]: what is left of the target's products."""
        return self.cross_SD - self.gram_SS @ weight_DS.T


def refit(start_DS: Array, fitted: Products, held_out: Products | None, ridge: float) -> Array:
    """Weights that predict a target from signals: ``min |A V^T - T|^2 + r |V - W|^2`` over tokens.

    ``V^T = W^T + (G + r I)^-1 (B - G W^T)`` with ``G = A^T A`` and ``B = A^T T``. With the dense model's output as
    target, and signals of a layer as the repaired layers before it leave them, V also makes good what these have lost
    (asymmetric reconstruction, https://arxiv.org/abs/1505.06798). What they have lost is mostly noise to a single
    layer, and with too few tokens V learns it: from 1e5 times the given ridge down, that is taken which predicts
    held-out tokens best, or none, and the weights stay W. (SmolLM2-135M, half of the neurons: 25,000 tokens want ridges
    of 0.1 to 10.)

    Args:
        start_DS: weights W that the ridge pulls towards.
        fitted: products over the tokens to learn from.
        held_out: products over others; without them the ridge is the given one. The weights are solved for both.
        ridge: relative ridge (times the mean diagonal of G), > 0.

    Returns:
        The weights, float64 [D, S].

    Raises:
        NumericError: the sums are not finite, or singular at this ridge.
    """
    xp = arrays.namespace(start_DS)
    both = fitted if held_out is None else fitted + held_out
    if not (bool(xp.all(xp.isfinite(both.gram_SS))) and bool(xp.all(xp.isfinite(both.cross_SD)))):
        raise NumericError("sums of products have NaN or infinite entries; does the model overflow in this dtype?")
    best = ridge if held_out is None else _best_ridge(start_DS, fitted, held_out, ridge)
    return start_DS if best is None else start_DS + _solved(both.gram_SS, both.unexplained(start_DS), best).T


def _best_ridge(start_DS: Array, fitted: Products, held_out: Products, ridge: float) -> float | None:
    """The one whose solution predicts the held-out tokens best; None if the start does."""
    xp = arrays.namespace(start_DS)
    left_SD, ahead_SD = fitted.unexplained(start_DS), held_out.unexplained(start_DS)
    best, least = None, 0.0
    for factor in RIDGES:
        step_SD = _solved(fitted.gram_SS, left_SD, factor * ridge)
        change = float(xp.sum(step_SD * (held_out.gram_SS @ step_SD - 2 * ahead_SD)))  # of the squared error
        if change >= least:
            break  # more tokens' noise than they teach; smaller ridges take more of both
        best, least = factor * ridge, change
    return best


def _solved(gram_SS: Array, right_SD: Array, ridge: float) -> Array:
    """``(G + r I)^-1 B`` with the ridge of :func:`added_ridge`."""
    xp, size = arrays.namespace(gram_SS), gram_SS.shape[0]
    added = added_ridge(gram_SS, float(xp.linalg.trace(gram_SS)) / size, ridge)
    shifted_SS = xp.eye(size, dtype=gram_SS.dtype, device=gram_SS.device)
    shifted_SS *= added  # in place: these matrices are the peak of a repair's memory
    shifted_SS += gram_SS
    try:
        return arrays.solve_positive(shifted_SS, right_SD)
    except ValueError as error:
        raise NumericError(
            f"the Gram matrix is singular at repair ridge {ridge:g}; raise it or record more tokens"
        ) from error


def norm_scale(gain_N: Float64, moments: Moments, kept_S: NDArray[np.int64]) -> float:
    """What the gains of an RMSNorm are multiplied by when dimensions leave, so that the others keep their size.

    The norm divides by the root mean square over the dimensions that are there. With the share ``p`` of the energy in
    S of N dimensions, it becomes ``sqrt(p N / S)`` times what it was.

    Args:
        gain_N: gains of the norm.
        moments: moments of what leaves it, over the calibration tokens.
        kept_S: dimensions that stay.

    Raises:
        NumericError: the moments are not finite, or nothing of the energy stays.
    """
    energy_N = np.diagonal(moments.gram_NN) / np.where(gain_N == 0, np.inf, np.square(gain_N))
    share = float(energy_N[kept_S].sum() / energy_N.sum())
    if not 0 < share <= 1:
        raise NumericError(f"{share:g} of the energy is in the dimensions that stay; look at the recorded activations")
    return float(np.sqrt(share * gain_N.size / kept_S.size))


def mean_bias(weight_DN: Float64, moments: Moments, kept_S: NDArray[np.int64]) -> Float64:
    """Bias that replaces the removed units by their mean activation, float64 [D]."""
    removed_R = np.setdiff1d(np.arange(weight_DN.shape[1]), kept_S)
    return weight_DN[:, removed_R] @ moments.mean_N[removed_R]
