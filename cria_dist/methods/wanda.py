"""Wanda for whole neurons (arXiv 2306.11695): weight times input norm, over a neuron's output column."""

from typing import ClassVar, Literal

import numpy as np

from cria_dist.errors import NumericError
from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict


class Wanda(MethodBase):
    """``|W_out[:, j]|_2 * |a_j|_2``: norm of the output column times norm of the signal over all calibration tokens.

    Wanda scores one weight, ``S_ij = |W_ij| * |a_j|_2``; this is the root of the sum of squares of a column's scores,
    and equals ``|W_out[:, j] a_j^T|_F``, the change of the layer's output when only this neuron goes. (FLAP's code
    compares with the mean of a column's scores instead, ``Wanda-sp``: the L1 norm of the column in place of its L2.)
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"

    name: Literal["wanda"] = "wanda"

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "wanda (structured)"

    @property
    def needs(self) -> frozenset[Statistic]:
        """The diagonal of the Gram matrix, and the output columns."""
        return frozenset({"moments", "weights"})

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the units of one site.

        Raises:
            NumericError: moments or weights were not given.
        """
        if statistics.moments is None or statistics.output_norm_N is None:
            raise NumericError("wanda needs moments and weights of the site; run the record stage with this method")
        scores_N = np.sqrt(np.diagonal(statistics.moments.gram_NN)) * statistics.output_norm_N
        return Verdict(statistics.norm_per_unit(scores_N))
