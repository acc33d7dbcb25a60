"""Coupled magnitude: product of the norms of a unit's incoming rows and outgoing column."""

from typing import ClassVar, Literal

from cria_dist.errors import NumericError
from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict


class Magnitude(MethodBase):
    """``|W_in[j]| * |W_out[:, j]|`` over all incoming maps (gate and up together); no data is looked at."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2301.12900"
    scores_experts: ClassVar[bool] = True

    name: Literal["magnitude"] = "magnitude"

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "magnitude"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Only the weights."""
        return frozenset({"weights"})

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the units of one site.

        Raises:
            NumericError: the weights were not given.
        """
        if statistics.weight_norm_N is None:
            raise NumericError("magnitude needs the weights of the site")
        return Verdict(statistics.weight_norm_N)
