"""MPruner: runs of layers that compute alike, by CKA, keep their first layers.

Hu, Park, Ferraiuolo, Ko, Kim, Song, Kim, "MPruner: Optimizing Neural Network Size with CKA-Based Mutual Information
Pruning". Shapes: T tokens, L layers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from cria_dist.arrays import Array
from cria_dist.maths import cka, layer_clusters
from cria_dist.methods.base import Verdict
from cria_dist.methods.layers import LayerMethod
from cria_dist.records import Float64

STEPS = (1, 2, 3)
"""The paper's granularities: of every cluster only the first layer stays; every other one goes; every third."""


class MPruner(LayerMethod):
    """Contiguous clusters of layers whose output is as similar as ``tau`` to that of their first layer.

    Differences from the authors' code: CKA is the unbiased minibatch estimate for language models too (theirs is the
    biased one there, which is higher with few tokens: ``tau`` means the same only under the same estimate); nothing is
    trained between the rounds; and the metric is the perplexity on held-out calibration sequences where theirs is the
    accuracy on the test set. Calibration sequences are not padded, and the recorder refuses states that are not finite.

    The loop over smaller and smaller models is ``prune.rounds``: each records anew.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2408.13482"

    name: Literal["mpruner"] = "mpruner"
    tau: Annotated[float, Field(gt=0, le=1)] = 0.98
    """Similarity to the first layer of a cluster from which a layer belongs to it."""
    stop: Literal["budget", "loss"] = "budget"
    """``budget``: exactly the layers that ``prune.ratio`` asks for. If clusters at ``tau`` can spare more, the most
    similar go; if they can spare fewer, ``tau`` is lowered as far as needed. ``loss``: the paper's loop. Only the first
    layer of every cluster stays; if that raises the perplexity by more than ``threshold``, every other layer goes, then
    every third, else none; ``prune.ratio`` is the most that may go."""
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    """``loss``: accepted increase of the perplexity over the dense model's, relative (0.2: at most 1.2 times)."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """``loss``: share of the calibration sequences, at their end, that the perplexity is measured on; CKA leaves them
    out."""
    minibatch: Annotated[int, Field(ge=2 * cka.FEWEST_TOKENS)] = 256
    """Most tokens in a minibatch; a longer sequence is cut evenly. A Gram matrix per layer has the square of it."""

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return f"mpruner, perplexity x {1 + self.threshold:g}" if self.stop == "loss" else "mpruner"

    @property
    def fewest_tokens(self) -> int:
        """What the unbiased estimate needs."""
        return cka.FEWEST_TOKENS

    @property
    def held_out_share(self) -> float:
        """None without the loop."""
        return self.held_out if self.stop == "loss" else 0.0

    @property
    def tolerance(self) -> float | None:
        """Of the loop."""
        return self.threshold if self.stop == "loss" else None

    def measure(self, states: Sequence[Array]) -> Float64:
        """Unbiased HSIC between the outputs of all layers, [L, L], summed over the sequence's minibatches."""
        tokens = states[0].shape[0]
        count = -(-tokens // self.minibatch)
        bounds = [tokens * part // count for part in range(count + 1)]
        minibatches = ([state_TD[start:stop, :] for state_TD in states[1:]] for start, stop in pairwise(bounds))
        return np.sum([cka.unbiased_hsic(one) for one in minibatches], axis=0)

    def judge(self, total: Float64) -> Verdict:
        """One minus the similarity to the first layer of the run each layer was compared with at ``tau``, [L].

        Layers below ``1 - tau`` are in a cluster they do not begin. Layer 0 is compared with none: it gets 2.

        Raises:
            NumericError: the output of a layer is the same for all tokens.
        """
        return Verdict(1 - layer_clusters.similarity_to_first(cka.alignment(total), self.tau))

    def removed(self, total: Float64, count: int) -> tuple[int, ...]:
        """The layers most similar to the first of their cluster, at the largest threshold that spares enough."""
        similarity_LL = cka.alignment(total)
        return self._spared(similarity_LL, layer_clusters.threshold_for(similarity_LL, count, self.tau), 1, count)

    def attempts(self, total: Float64, most: int) -> tuple[tuple[int, ...], ...]:
        """What goes at each granularity; nothing where all clusters are single layers."""
        similarity_LL = cka.alignment(total)
        return tuple(self._spared(similarity_LL, self.tau, step, most) for step in STEPS)

    def _spared(self, similarity_LL: Float64, threshold: float, step: int, most: int) -> tuple[int, ...]:
        candidates = layer_clusters.redundant(layer_clusters.clusters(similarity_LL, threshold), step)
        similarity_L = layer_clusters.similarity_to_first(similarity_LL, threshold)
        return layer_clusters.most_similar(candidates, similarity_L, most)
