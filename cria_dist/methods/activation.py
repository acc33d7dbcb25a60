"""Activation norm (Minitron, arXiv 2407.14679): what hardly fires goes first."""

from typing import ClassVar, Literal

import numpy as np

from cria_dist.errors import NumericError
from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict


class Activation(MethodBase):
    """``|a_j|_2 = sqrt(sum_t a_jt^2)``: L2 norm of a neuron's post-activation signal over all calibration tokens.

    The paper aggregates the tokens' values along the sequence and over the batch, and tries mean of absolute values, L2
    norm and variance for either. This is L2 along both: one norm over all tokens, however they are cut into sequences.
    NVIDIA's code takes the mean along each sequence s of T tokens and L2 over the batch,
    ``sqrt(sum_s (mean_t |a_jst|)^2)``. Times sqrt(T) that is at most the norm here, and equal to it for a neuron
    equally strong at every token of a sequence; a neuron that fires rarely and strongly ranks higher here.

    In a gated MLP the signal is ``act(gate) * up``, the input of the output projection. Of an expert it is the norm of
    its output times its router weight, 0 for a token that went elsewhere, and the score is the mean over all tokens
    (REAP, https://arxiv.org/abs/2510.13999, takes that over the expert's own tokens).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.14679"
    scores_experts: ClassVar[bool] = True
    scores_residual: ClassVar[bool] = True

    name: Literal["activation"] = "activation"

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "activation"

    @property
    def needs(self) -> frozenset[Statistic]:
        """The diagonal of the Gram matrix."""
        return frozenset({"moments"})

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the units of one site.

        Raises:
            NumericError: the moments were not given.
        """
        if statistics.moments is None:
            raise NumericError("activation needs the moments of the site; run the record stage with this method")
        if statistics.routed:
            return Verdict(statistics.moments.mean_N)
        return Verdict(statistics.norm_per_unit(np.sqrt(np.diagonal(statistics.moments.gram_NN))))
