"""What the surviving output weights do for the removed units.

Shapes: D outputs of the next linear map, N units, S surviving, R removed.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from cria_dist.errors import NumericError
from cria_dist.records import Float64, Moments

RIDGES = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
"""Times the given one, that are tried on held-out tokens."""


def least_squares(weight_DN: Float64, moments: Moments, kept_S: NDArray[np.int64], ridge: float) -> Float64:
    """Re-solve the surviving columns of the output projection: ``min |A W^T - A_S V^T|^2`` over tokens.

    ``V = W[:, S] + W[:, R] G[R, S] (G[S, S] + r I)^-1`` with the Gram matrix ``G = A^T A`` of the post-activation
    signals and ``r = ridge * mean(diag G[S, S])``. The ridge pulls towards the unrepaired weights, so that directions
    the calibration tokens never excite keep what they had.

    Args:
        weight_DN: output projection, one column per unit.
        moments: moments of the post-activation signals over the calibration tokens.
        kept_S: indices of the surviving units.
        ridge: relative ridge, > 0.

    Returns:
        New columns of the surviving units, float64 [D, S].

    Raises:
        NumericError: the Gram matrix is not finite.
    """
    if not np.isfinite(moments.gram_NN).all():
        raise NumericError("the Gram matrix has NaN or infinite entries; look at the recorded activations")
    removed_R = np.setdiff1d(np.arange(weight_DN.shape[1]), kept_S)
    gram_RS = moments.gram_NN[np.ix_(removed_R, kept_S)]
    factor, _ = _factor(moments.gram_NN[np.ix_(kept_S, kept_S)], ridge)
    correction_SD = scipy.linalg.cho_solve(factor, (weight_DN[:, removed_R] @ gram_RS).T)
    return weight_DN[:, kept_S] + correction_SD.T


@dataclass(frozen=True, slots=True)
class Products:
    """Sums of products over tokens: of signals A with each other, and with a target T; ``a + b`` covers both sets.

    Attributes:
        gram_SS: ``A^T A``, float64.
        cross_SD: ``A^T T``, float64.
    """

    gram_SS: Float64
    cross_SD: Float64

    def __add__(self, other: "Products") -> "Products":
        """Merge two disjoint sets of tokens."""
        return Products(self.gram_SS + other.gram_SS, self.cross_SD + other.cross_SD)

    def error(self, weight_DS: Float64) -> float:
        """``|A V^T - T|^2`` less ``|T|^2``."""
        return float(np.sum(weight_DS @ self.gram_SS * weight_DS) - 2 * np.sum(weight_DS * self.cross_SD.T))


def refit(start_DS: Float64, fitted: Products, held_out: Products | None, ridge: float) -> Float64:
    """Weights that predict a target from signals: ``min |A V^T - T|^2 + r |V - W|^2`` over tokens.

    ``V = (B^T + r W) (G + r I)^-1`` with ``G = A^T A`` and ``B = A^T T``. With the dense model's output as target, and
    signals of a layer as the repaired layers before it leave them, V also makes good what these have lost (asymmetric
    reconstruction, https://arxiv.org/abs/1505.06798). What they have lost is mostly noise to a single layer, and with
    too few tokens V learns it: of ridges up to 1e5 times the given one that is taken which predicts held-out tokens
    best, or none, and the weights stay W. (SmolLM2-135M, half of the neurons: 25,000 tokens want ridges of 0.1 to 10.)

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
    both = fitted if held_out is None else fitted + held_out
    if not (np.isfinite(both.gram_SS).all() and np.isfinite(both.cross_SD).all()):
        raise NumericError("sums of products have NaN or infinite entries; does the model overflow in this dtype?")
    if held_out is None:
        return _solved(start_DS, fitted, ridge)
    errors = {one * ridge: held_out.error(_solved(start_DS, fitted, one * ridge)) for one in RIDGES}
    best = min(errors, key=errors.__getitem__)
    return _solved(start_DS, both, best) if errors[best] < held_out.error(start_DS) else start_DS


def _solved(start_DS: Float64, products: Products, ridge: float) -> Float64:
    factor, added = _factor(products.gram_SS, ridge)
    return scipy.linalg.cho_solve(factor, products.cross_SD + added * start_DS.T).T


def _factor(gram_SS: Float64, ridge: float) -> tuple[tuple[Float64, bool], float]:
    """The Cholesky factor of the Gram matrix with its ridge, and the ridge."""
    mean_diagonal = float(np.trace(gram_SS)) / len(gram_SS)
    added = ridge * mean_diagonal if mean_diagonal > 0 else 1.0
    gram_SS = gram_SS.copy()
    gram_SS[np.diag_indices(len(gram_SS))] += added
    try:
        return scipy.linalg.cho_factor(gram_SS, lower=True), added
    except scipy.linalg.LinAlgError as error:
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
