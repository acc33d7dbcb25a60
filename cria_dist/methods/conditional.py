"""Conditional variance: what a neuron says that the others do not, times how much the next layer listens."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths.elimination import eliminate
from cria_dist.maths.group_elimination import eliminate_groups
from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict


class Conditional(MethodBase):
    """Greedy optimal-brain-surgeon order on the Gram matrix of the post-activation signals.

    The precision matrix ``P = (G + r I)^-1`` is the maximum-likelihood graph of the neurons: ``1 / P_jj`` is the part
    of neuron j that its neighbours in that graph cannot explain, and ``|w_j|^2 / P_jj`` the squared error of the
    layer's output when j goes and the output weights of the others are refitted. The cheapest neuron goes, the others
    take over its part, and so on to the last; copies go at no cost. The least-squares repair solves the same problem
    for the final set.

    A score is the share of the output's energy that is lost when this neuron and all below it are gone. Heads go group
    by group in the same way: what a group's signals together say that those of the other groups do not.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2302.04089"

    name: Literal["conditional"] = "conditional"
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Relative ridge of the precision matrix (times the mean diagonal of the Gram matrix; at most the median)."""

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "conditional"

    @property
    def needs(self) -> frozenset[Statistic]:
        """The Gram matrix and the output weights."""
        return frozenset({"moments", "weights"})

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the neurons of one site.

        Raises:
            NumericError: statistics are missing or not finite.
        """
        moments, output_DN = statistics.moments, statistics.output_DN
        if moments is None or output_DN is None:
            raise NumericError("conditional needs moments and weights; run the record stage with this method")
        xp = arrays.namespace(output_DN)
        gram_NN = xp.asarray(moments.gram_NN)
        if statistics.span == 1:
            found = eliminate(gram_NN, output_DN, self.ridge)
        else:
            found = eliminate_groups(gram_NN, output_DN, statistics.span, self.ridge)
        energy = float(xp.sum((output_DN @ gram_NN) * output_DN))
        keep_N = np.empty(statistics.width)
        keep_N[found.order_N] = np.cumsum(found.cost_N) / energy if energy > 0 else np.arange(1.0, statistics.width + 1)
        return Verdict(keep_N, facts={"lost_at_half": float(np.median(keep_N))})
