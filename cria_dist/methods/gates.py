"""The seam for methods that learn: a gate per unit is trained for a short while, and what it learned is the score.

The gate multiplies the post-activation signal, which is the input of the output projection (but see
:attr:`GateMethod.scales_norms`). In front of the activation
its effect would depend on the activation's shape (SiLU and GELU are not homogeneous), in front of a norm the norm would
take it out again; behind the activation a gate of 0 removes exactly this unit, and its column carries any factor.
"""

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from cria_dist.arrays import Array
from cria_dist.errors import NumericError
from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict
from cria_dist.records import Float64


class GateMethod(MethodBase):
    """A method whose gates are learned on the calibration text by next-token loss and a penalty.

    The papers add their penalties up over all units, with weights tuned per network. A unit's part in the loss falls
    as their number grows, so here the loss gets the mean over all units, which makes one weight serve small and large
    models; divide by the number of units to compare with the papers.

    The optimiser is Adam without weight decay, in as many data-parallel workers as the recovery has
    (``recover.workers``). The gates are a criterion and nothing else: what is pruned are the weights of the
    checkpoint, also where the MLPs learned along (``variant = "all"``), whose learned weights are dropped; the recovery
    trains later. Every round learns again, on the model the last one left.
    """

    comparable: ClassVar[bool] = True
    """Every gate starts from the same value or share, learns by the same schedule and is a factor of the signal."""

    steps: Annotated[int, Field(ge=1)] = 100
    """Optimiser steps."""
    batch_sequences: Annotated[int, Field(ge=1)] = 8
    """Training sequences per step, over all workers."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens per training sequence, cut from the calibration tokens."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    """Peak learning rate of the gates; linear warm-up over a tenth of the steps, then cosine to a tenth of the peak."""
    weight_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak learning rate of the MLPs' maps (``variant = "all"``), by the same schedule."""
    variant: Literal["gates", "all"] = "gates"
    """What learns: the gates alone, everything else frozen, or gates and the maps of the MLPs together."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """The learned gates."""
        return frozenset({"gates"})

    @property
    def scores_groups(self) -> bool:
        """Gates are on neurons."""
        return False

    @property
    @abstractmethod
    def start(self) -> float:
        """What every unit starts to learn from; there the gate is 1 and the model computes what it did."""

    @property
    def scales_norms(self) -> bool:
        """Whether the gates are in the place of batch norm's scales, in front of the activation."""
        return False

    def starts(self, share_N: Float64) -> Float64:
        """What every unit starts to learn from, [N].

        Args:
            share_N: shares of the largest scale of batch norm, where the gates are in its place; else 1.
        """
        return np.full(len(share_N), self.start)

    @abstractmethod
    def gate(self, learned_N: Array) -> Array:
        """What the signals are multiplied by, [N]; differentiable where the library is."""

    @abstractmethod
    def penalty(self, learned_N: Array) -> Array:
        """What the gates of one site are charged, a single number; the loss gets the mean over all units."""

    @abstractmethod
    def importance(self, learned_N: Float64) -> Float64:
        """The score of each unit, [N]."""

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the units of one site.

        Raises:
            NumericError: the gates were not given.
        """
        if statistics.gate_N is None:
            raise NumericError(f"{self.title} needs the learned gates of the site; run the analyse stage with it")
        keep_N = self.importance(statistics.gate_N)
        return Verdict(keep_N, facts={"median_gate": float(np.median(keep_N)), "least_gate": float(keep_N.min())})
