"""The seam between a paper and the pipeline: statistics of one site in, a verdict on its units out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from cria_dist.arrays import Array
from cria_dist.records import Float64, Int32, Moments, Spectrum

Statistic = Literal["signals", "moments", "weights", "gradients", "gates", "hidden"]


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """What a method may look at; fields it does not name in ``needs`` are None.

    Attributes:
        width: number of units N.
        span: signals of a unit, one after the other: 1 for a neuron, more for a group of heads. What is indexed by N
            below has one row per signal then (N * span), but for ``weight_norm_N``, ``taylor_N`` and ``gate_N``.
        input_NM: pre-activation signals (for a gated MLP the gate and the up signal side by side), array of the
            analyst's library, float32.
        output_NM: post-activation signals of the same tokens.
        moments: moments of the post-activation signals over all calibration tokens.
        weight_norm_N: product of the norms of a unit's incoming rows and outgoing column (coupled magnitude).
        output_norm_N: norm of a unit's column in the next linear map.
        output_DN: the next linear map, array of the analyst's library, float64.
        taylor_N: sum over a unit's coupled weights of ``|w * dL/dw|``, mean over shards of calibration sequences.
        gate_N: what a unit's gate learned, before it is made a factor.
        seed: seed for methods that draw numbers; differs per site.
        routed: units are experts; a signal is an expert's router weight times the norm of its output, 0 for tokens that
            went elsewhere.
    """

    width: int
    input_NM: Array | None = None
    output_NM: Array | None = None
    moments: Moments | None = None
    weight_norm_N: Float64 | None = None
    output_norm_N: Float64 | None = None
    output_DN: Array | None = None
    taylor_N: Float64 | None = None
    gate_N: Float64 | None = None
    seed: int = 0
    span: int = 1
    routed: bool = False

    def sum_per_unit(self, values_N: Float64) -> Float64:
        """Sum of what is given per signal over the signals of each unit."""
        return values_N.reshape(self.width, self.span).sum(axis=1)

    def norm_per_unit(self, values_N: Float64) -> Float64:
        """L2 norm of what is given per signal, not negative, over the signals of each unit."""
        return values_N if self.span == 1 else np.sqrt(self.sum_per_unit(np.square(values_N)))


@dataclass(frozen=True, slots=True)
class GradientSample:
    """The calibration sequences a method wants gradients of.

    Attributes:
        sequences: how many, from the first one on.
        shard_sequences: sequences whose mean loss one gradient is of; the last shard may be shorter.
    """

    sequences: int
    shard_sequences: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Scores of one site: higher means keep, ``-inf`` means dead."""

    keep_N: Float64
    edges_E2: Int32 | None = None
    spectrum: Spectrum | None = None
    facts: Mapping[str, float] = field(default_factory=dict[str, float])


class MethodBase(BaseModel):
    """A published method: its configuration and its score in one frozen class."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    paper: ClassVar[str]
    unit: ClassVar[str] = "mlp"
    scores_experts: ClassVar[bool] = False
    """Whether the method can score experts, of which there are no signals before an activation and no output map."""
    scores_residual: ClassVar[bool] = False
    """Whether the method can score dimensions of the residual stream by what is read there."""
    comparable: ClassVar[bool] = False
    """Whether scores of all sites are on one scale, so that one threshold over all of them means something."""

    @property
    def title(self) -> str:
        """Name shown in tables."""
        raise TypeError(f"{type(self).__name__} must define title")

    @property
    def needs(self) -> frozenset[Statistic]:
        """Which statistics :meth:`score` reads."""
        raise TypeError(f"{type(self).__name__} must define needs")

    @property
    def gradient_sample(self) -> GradientSample:
        """What gradients are taken of, for a method that needs them."""
        raise TypeError(f"{type(self).__name__} must define gradient_sample if it needs gradients")

    @property
    def smallest_site(self) -> int:
        """Fewest units a site may have for this method."""
        return 1

    @property
    def smallest_group_site(self) -> int:
        """Fewest units a site of groups (of heads) may have."""
        return 1

    @property
    def scores_groups(self) -> bool:
        """Whether the method can score groups of heads."""
        return self.unit == "mlp"

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the units of one site."""
        raise TypeError(f"{type(self).__name__} must define score")
