"""A language model that goes on from the hidden states before any of its layers: what lies before is run once.

Shapes: S sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from transformers import PreTrainedModel

from cria_dist.models.blocks import Passage, StandIn, embedded
from cria_dist.models.mlp import MlpFamily


class TailModel:
    """A loaded model, run in parts by its own forward pass.

    Args:
        model: the whole model.
        family: its adapter.
    """

    def __init__(self, model: PreTrainedModel, family: MlpFamily) -> None:
        self.model = model
        self._decoder = cast("PreTrainedModel", getattr(model, model.base_model_prefix))
        self._layers = cast(torch.nn.ModuleList, model.get_submodule(family.layers))
        self._own = list(self._layers)
        self._stand_ins = [StandIn(layer) for layer in self._own]
        self.depth = len(self._own)

    def embed(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        """The hidden states before the first layer, [S, T, D]."""
        with self._only(0, 0, None) as passage:
            self._decoder(input_ids=tokens_ST.to(self.model.device, torch.int64), use_cache=False)
        return _left(passage)

    def advance(self, hidden_STD: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """The hidden states after the layers ``first`` to ``stop - 1``, from those before them."""
        if first == stop:
            return hidden_STD
        with self._only(first, stop, hidden_STD) as passage:
            self._decoder(inputs_embeds=embedded(hidden_STD, self.model), use_cache=False)
        return _left(passage)

    def logits(self, hidden_STD: torch.Tensor, first: int) -> torch.Tensor:
        """What the whole model predicts, [S, T, V], from the hidden states before layer ``first``."""
        with self._only(first, self.depth, hidden_STD):
            return self.model(inputs_embeds=embedded(hidden_STD, self.model), use_cache=False).logits

    @contextmanager
    def without(self, layer: int) -> Generator[None]:
        """The model with a layer that hands the hidden state through, until the block ends."""
        kept, self._own[layer] = self._own[layer], self._stand_ins[layer]
        try:
            yield
        finally:
            self._own[layer] = kept

    @contextmanager
    def _only(self, first: int, stop: int, hidden_STD: torch.Tensor | None) -> Generator[Passage]:
        """Run these layers only, on a hidden state of ours; with none of them it is the embedding that is kept."""
        passage = Passage()
        passage.hidden = hidden_STD
        for index in range(self.depth):
            self._layers[index] = self._own[index] if first <= index < stop else self._stand_ins[index]
        hooks = [self._layers[max(stop - 1, 0)].register_forward_hook(passage.leave)]
        if hidden_STD is not None:
            hooks.append(self._layers[first].register_forward_pre_hook(passage.enter, with_kwargs=True))
        try:
            with torch.inference_mode():
                yield passage
        finally:
            for hook in hooks:
                hook.remove()
            for index, layer in enumerate(self._own):
                self._layers[index] = layer


def _left(passage: Passage) -> torch.Tensor:
    if passage.hidden is None:
        raise RuntimeError("the model's forward pass did not reach the layer")
    return passage.hidden
