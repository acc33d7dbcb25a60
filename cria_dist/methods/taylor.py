"""First-order Taylor importance (LLM-Pruner, arXiv 2305.11627): what the loss would feel, by its gradients."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cria_dist.errors import NumericError
from cria_dist.methods.base import GradientSample, MethodBase, SiteStatistics, Statistic, Verdict


class Taylor(MethodBase):
    """``sum_w |w * dL/dw|`` over every weight of a neuron: its incoming rows (and their biases) and its output column.

    The sum of absolute values is LLM-Pruner's element-wise first-order importance (``param_first``, groups added up).
    The absolute value of the sum (``vectorize``) is another criterion, in which a neuron's weights cancel out.

    L is the mean next-token loss of a shard of sequences, and the importance is the mean over shards, weighted by their
    sequences. The authors take one gradient over all their sequences (10 of 64 tokens):
    ``shard_sequences = sequences``. Smaller shards are computed in parallel, and gradients that differ between
    sequences cancel less before the absolute value is taken.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.11627"
    scores_experts: ClassVar[bool] = True

    name: Literal["taylor"] = "taylor"
    sequences: Annotated[int, Field(ge=1)] = 16
    """Calibration sequences to take gradients of: the first ones."""
    shard_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences whose mean loss one gradient is taken of: the unit of work and of resumption."""

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "taylor"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Products of weights and gradients, added up per unit."""
        return frozenset({"gradients"})

    @property
    def gradient_sample(self) -> GradientSample:
        """The sequences asked for."""
        return GradientSample(self.sequences, self.shard_sequences)

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the units of one site.

        Raises:
            NumericError: the gradients were not given.
        """
        if statistics.taylor_N is None:
            raise NumericError("taylor needs the gradients of the site; run the analyse stage with this method")
        return Verdict(statistics.taylor_N)
