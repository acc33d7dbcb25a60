"""Random removal: the baseline every criterion has to beat."""

from typing import ClassVar, Literal

import numpy as np

from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict


class Random(MethodBase):
    """A uniform random number per unit, from the run's seed and the site."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1810.05270"
    scores_experts: ClassVar[bool] = True
    scores_residual: ClassVar[bool] = True

    name: Literal["random"] = "random"

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "random"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Nothing."""
        return frozenset()

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Draw the scores of one site."""
        return Verdict(np.random.default_rng(statistics.seed).random(statistics.width))
