"""Going on from a hidden state is what the whole model does, for every family of decoders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.tails import TailModel

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_every_start_gives_the_same_logits(model_type: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", model_type, num_hidden_layers=4, **MODELS[model_type])
    model = load_model(folder, Numerics())
    with torch.inference_mode():
        expected = model(input_ids=TOKENS, use_cache=False).logits
    tail = TailModel(model, family_of(read_config(folder)))
    hidden, at = tail.embed(TOKENS), 0
    for layer in (0, 1, 3):
        hidden, at = tail.advance(hidden, at, layer), layer
        assert torch.equal(tail.logits(hidden, layer), expected)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, expected), "the model was left changed"


def test_only_the_layers_asked_for_are_run(pico: Path) -> None:
    model = load_model(pico, Numerics())
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    tail = TailModel(model, family_of(read_config(pico)))
    hidden = tail.embed(TOKENS)
    assert ran == []
    hidden = tail.advance(hidden, 0, 1)
    assert ran == [0]
    tail.logits(hidden, 1)
    assert ran == [0, 1]
