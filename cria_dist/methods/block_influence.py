"""Block influence: a layer that hardly turns the hidden state has little to say.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", equation 1.
Shapes: T tokens, D hidden, L layers.
"""

import itertools
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from cria_dist.arrays import Array
from cria_dist.errors import NumericError
from cria_dist.maths.cosine import cosine_sum
from cria_dist.methods.base import Verdict
from cria_dist.methods.layers import LayerMethod
from cria_dist.records import Float64


class BlockInfluence(LayerMethod):
    """``1 - mean over tokens of cos(x_t, y_t)``, x entering the layer and y leaving it.

    The state that leaves the last layer is taken before the final norm: after it, the last layer would be credited
    with what the norm does.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"

    name: Literal["block_influence"] = "block_influence"

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "block_influence"

    def measure(self, states: Sequence[Array]) -> Float64:
        """Sum of the cosines per layer, then the number of tokens per layer, [2, L]."""
        pairs = [cosine_sum(before, after) for before, after in itertools.pairwise(states)]
        return np.asarray(pairs, dtype=np.float64).T

    def judge(self, total: Float64) -> Verdict:
        """One minus the mean cosine, [L].

        Raises:
            NumericError: a layer has no token whose hidden states have a direction.
        """
        sum_L, count_L = total
        if not count_L.all():
            raise NumericError(f"layer {int(np.argmin(count_L))}: the hidden states of all sampled tokens are zero")
        return Verdict(1 - sum_L / count_L)
