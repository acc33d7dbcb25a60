"""Receding neuron importances (Suteu & Guo, arXiv 2204.06404): bounded gates, only small ones pushed."""

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from cria_dist.arrays import Array
from cria_dist.maths.gates import receding_penalty, sigmoid
from cria_dist.methods.gates import GateMethod
from cria_dist.records import Float64


class Receding(GateMethod):
    """``sigmoid(w_i)`` after training with ``loss + strength * mean_i s_i (1 - ln s_i)``, ``s = sigmoid(w + shift)``.

    The paper puts ``sigmoid(w)`` in place of the scale gamma of batch norm in VGG and ResNet: ``scaling =
    "batch_norm"``. There is no shift beta in it, so that a scale of 0 removes the channel; a trained network has one,
    which stays. And the paper trains from scratch; a trained network must start as what it is: ``sigmoid(w_i)`` starts
    at ``opening * gamma_i / max gamma``, the maximum over all layers, and is multiplied by ``max gamma / opening``.
    Without beta the ReLU would hand on the factor, and a gate behind it would be the same; with beta it is not.

    Transformers normalise the residual stream, not neurons, so there the analogue is a bounded gate on every MLP
    neuron, ``scaling = "signals"``: all gates start at ``opening``, and 1 / opening is taken into the output map, which
    makes the factor ``sigmoid(w) / opening``, 1 at the start. Between 0 and 1 / opening a neuron can recede and also
    grow.

    The paper's recipe is SGD for 160 epochs, with 10 times the learning rate (1.0) and no weight decay for the gates.
    Here it is Adam for a short while; the gates' rate is far above the weights', without weight decay, which would pull
    w to 0, a gate of one half. The paper's shifts, 3 for VGG and 0 for ResNet, put the strongest push at gates of 0.015
    and 0.236; from one half only the second is felt within a short while, hence the default. The paper's threshold is
    one quantile over all layers, ``prune.allocation = "global"``, which ranks gates as they are.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2204.06404"

    name: Literal["receding"] = "receding"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    """Peak learning rate of w; linear warm-up over a tenth of the steps, then cosine to a tenth of the peak."""
    opening: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """``sigmoid(w)`` at the start; in place of batch norm's scales, that of the largest."""
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Weight of the mean penalty of all neurons (lambda; the paper: 1e-3 per filter of VGG-16, 4.2 in this measure, and
    1e-4 for ResNet-56)."""
    scaling: Annotated[Literal["signals", "batch_norm"], Field(exclude_if=lambda value: value == "signals")] = "signals"
    """What is bounded: the signals behind the activation, or in front of it the scales of batch norm, which
    convolutional nets have."""
    shift: Annotated[float, Field(ge=-20, le=20)] = 0.0
    """Moves the strongest push to smaller gates (b; the paper: 3 for VGG, 0 for ResNet)."""

    @property
    def title(self) -> str:
        """Name shown in tables."""
        named = [*(["batch_norm"] if self.scales_norms else []), *(["all"] if self.variant == "all" else [])]
        return f"receding ({', '.join(named)})" if named else "receding"

    @property
    def scales_norms(self) -> bool:
        """Whether the gates are in the place of batch norm's scales."""
        return self.scaling == "batch_norm"

    @property
    def start(self) -> float:
        """``w`` of the opening."""
        return math.log(self.opening / (1 - self.opening))

    def starts(self, share_N: Float64) -> Float64:
        """``w`` with ``sigmoid(w) = opening * share``; shares are at least 1e-12, [N]."""
        if not self.scales_norms:
            return np.full(len(share_N), self.start)
        gate_N = self.opening * np.clip(share_N, 1e-12, 1.0)
        return np.log(gate_N / (1 - gate_N))

    def gate(self, learned_N: Array) -> Array:
        """``sigmoid(w) / opening``."""
        return sigmoid(learned_N) / self.opening

    def penalty(self, learned_N: Array) -> Array:
        """``strength * sum s (1 - ln s)``."""
        return self.strength * receding_penalty(learned_N, self.shift)

    def importance(self, learned_N: Float64) -> Float64:
        """``sigmoid(w)``."""
        return sigmoid(learned_N)
