"""What the surviving output weights do for the removed units.

Shapes: D outputs of the next linear map, N units, S surviving, R removed.
"""

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from cria_dist.errors import NumericError
from cria_dist.records import Float64, Moments


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
    gram_SS = moments.gram_NN[np.ix_(kept_S, kept_S)].copy()
    gram_RS = moments.gram_NN[np.ix_(removed_R, kept_S)]
    mean_diagonal = float(np.trace(gram_SS)) / kept_S.size
    gram_SS[np.diag_indices(kept_S.size)] += ridge * mean_diagonal if mean_diagonal > 0 else 1.0
    try:
        factor = scipy.linalg.cho_factor(gram_SS, lower=True)
    except scipy.linalg.LinAlgError as error:
        raise NumericError(
            f"the Gram matrix is singular at repair ridge {ridge:g}; raise it or record more tokens"
        ) from error
    correction_SD = scipy.linalg.cho_solve(factor, (weight_DN[:, removed_R] @ gram_RS).T)
    return weight_DN[:, kept_S] + correction_SD.T


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
