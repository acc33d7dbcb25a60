"""Centred kernel alignment of representations: linear kernel, unbiased, summed over minibatches; float64.

Unbiased HSIC: Song et al., "Feature Selection via Dependence Maximization" (JMLR 2012), equation 5. Minibatch CKA:
Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?" (arXiv 2010.15327), equation 3. The biased
estimate grows as the tokens get fewer, so that its values depend on the size of a minibatch; this one's do not.
Shapes: T tokens of a minibatch, D dimensions (may differ), L representations.
"""

from collections.abc import Sequence

import numpy as np

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.errors import NumericError
from cria_dist.records import Float64

FEWEST_TOKENS = 4
"""The unbiased estimate divides by T (T - 3)."""


def unbiased_hsic(states: Sequence[Array]) -> Float64:
    """Unbiased HSIC of every pair of representations of the same tokens; sums over minibatches give CKA.

    Args:
        states: L of [T, D].

    Returns:
        Symmetric [L, L] on the host.

    Raises:
        NumericError: there are fewer than four tokens, or a value is not finite.
    """
    xp, tokens = arrays.namespace(*states), states[0].shape[0]
    if tokens < FEWEST_TOKENS:
        raise NumericError(f"unbiased CKA needs {FEWEST_TOKENS} tokens in a minibatch and there are {tokens}")
    centred_LX = xp.stack([xp.reshape(_centred_gram(state_TD), (-1,)) for state_TD in states])
    hsic_LL = arrays.to_numpy(centred_LX @ centred_LX.T) / (tokens * (tokens - 3))
    if not np.isfinite(hsic_LL).all():
        broken = int(np.argmin(np.isfinite(np.diagonal(hsic_LL))))
        raise NumericError(f"CKA: hidden states after layer {broken} are not finite or too large")
    return hsic_LL


def alignment(hsic_LL: Float64) -> Float64:
    """CKA [L, L] from HSIC summed over minibatches: 1 on the diagonal; unrelated representations scatter around 0.

    Raises:
        NumericError: a representation is the same for all tokens.
    """
    own_L = np.diagonal(hsic_LL)
    if not (own_L > 0).all():
        raise NumericError(f"CKA: hidden states after layer {int(np.argmin(own_L))} are the same for all tokens")
    return hsic_LL / np.sqrt(np.outer(own_L, own_L))


def _centred_gram(state_TD: Array) -> Array:
    """Gram matrix with a zero diagonal, centred so that products of two of them sum to T (T - 3) times the HSIC."""
    xp, tokens = arrays.namespace(state_TD), state_TD.shape[0]
    state_TD = xp.astype(state_TD, xp.float64)
    state_TD = state_TD - xp.mean(state_TD, axis=0)  # changes nothing but rounding: a large mean would cancel
    gram_TT = state_TD @ state_TD.T
    others_TT = 1.0 - xp.eye(tokens, dtype=xp.float64)
    gram_TT = gram_TT * others_TT
    mean_T = xp.sum(gram_TT, axis=0) / (tokens - 2)
    mean_T = mean_T - xp.sum(mean_T) / (2 * (tokens - 1))
    return (gram_TT - mean_T[:, None] - mean_T[None, :]) * others_TT
