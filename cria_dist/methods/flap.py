"""FLAP's weighted input feature variance (arXiv 2312.11983): what a bias can stand in for goes first."""

from typing import ClassVar, Literal

import numpy as np

from cria_dist.errors import NumericError
from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict


class Flap(MethodBase):
    """``WIFV_j = var_t(a_jt) * |W_out[:, j]|_2^2``: fluctuation of the signal, weighted by the output column.

    It is the mean squared change of the layer's output that is left when only this neuron goes and its mean stays as a
    bias: the method's own repair, ``prune.repair = "bias"``. The variance is over all calibration tokens and divided by
    their number; the authors' code divides by the number of sequences, the same factor for every neuron.

    The authors also compare layers, by standardised scores: that is an allocation, not this score. Their code counts a
    head as a fixed number of neurons; here a unit costs the parameters that really leave with it.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11983"

    name: Literal["flap"] = "flap"

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "flap"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Variances from the moments, and the output columns."""
        return frozenset({"moments", "weights"})

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the units of one site.

        Raises:
            NumericError: moments or weights were not given.
        """
        if statistics.moments is None or statistics.output_norm_N is None:
            raise NumericError("flap needs moments and weights of the site; run the record stage with this method")
        return Verdict(statistics.sum_per_unit(np.square(statistics.moments.std_N * statistics.output_norm_N)))
