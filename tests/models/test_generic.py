"""Decoders beside Llama's own relatives: found by their modules' names, with two plain maps, or transposed ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cria_dist import load_pruned
from cria_dist.errors import ConfigError
from cria_dist.models import surgery
from cria_dist.models.blocks import Block, BlockModel
from cria_dist.models.checkpoint import Numerics, count_parameters, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.generic import GenericFamily
from cria_dist.models.surgery import Surgery
from cria_dist.records import Site

MakeModel = Callable[..., Path]

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
EVEN = {"layer-000.mlp": tuple(range(0, 48, 2)), "layer-001.mlp": tuple(range(5, 29))}
UNEVEN = {"layer-000.mlp": tuple(range(0, 48, 3)), "layer-001.mlp": tuple(range(5, 29))}
GENERIC = ("cohere", "ernie4_5", "granite", "helium", "olmo2", "olmo3", "seed_oss", "smollm3", "stablelm")
MODELS: dict[str, dict[str, Any]] = {
    **{name: {} for name in GENERIC},
    "glm": {"num_key_value_heads": 2},
    "gpt2": {"n_inner": 48, "num_key_value_heads": None, "head_dim": None},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt-350m": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def dense(request: pytest.FixtureRequest, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / request.param
    return make_model(folder, **{"model_type": request.param, **MODELS[request.param]})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.float()


@pytest.mark.parametrize("kept", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_removing_equals_masking(dense: Path, kept: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    config, model = read_config(dense), load_model(dense, Numerics())
    family, whole = family_of(config), logits(model)
    assert isinstance(family, GenericFamily) == (config["model_type"] in GENERIC)
    operation = Surgery(family, config, kept)
    copy = logits(surgery.pruned_copy(model, operation))
    with torch.no_grad():
        for key, stay in kept.items():
            output = model.get_submodule(family.modules(Site.from_key(key)).output)
            family.oriented(output.weight)[:, sorted(set(range(48)) - set(stay))] = 0
    masked = logits(model)
    assert (masked - whole).abs().max() > 1e-2 * whole.abs().max(), "the removed units do nothing"
    surgery.write_pruned(dense, tmp_path / "pruned", operation)
    pruned = load_pruned(tmp_path / "pruned")
    for found in (copy, logits(pruned)):
        assert torch.allclose(found, masked, rtol=1e-4, atol=1e-5), (found - masked).abs().max()
    if kept is EVEN:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()), logits(pruned))
    removed = sum(48 - len(stay) for stay in kept.values())
    left = count_parameters(read_config(tmp_path / "pruned"))
    assert count_parameters(config) - left == removed * family.unit_cost(Site(0), config)
    assert pruned.generate(TOKENS[:1], attention_mask=torch.ones(1, 20), max_new_tokens=2).shape[1] > 20


def test_blocks_equal_the_whole_model(dense: Path) -> None:
    """Hidden states of the first layer alone, handed to the second alone."""
    config = read_config(dense)
    family, model, seen = family_of(config), load_model(dense, Numerics()), []
    for layer in model.get_submodule(family.layers):
        layer.register_forward_hook(lambda *args: seen.append(args[2][0] if isinstance(args[2], tuple) else args[2]))
    logits(model)
    first = BlockModel(dense, Numerics(), family, Block(0, 1, 2))(TOKENS)
    assert torch.equal(first, seen[0])
    assert torch.equal(BlockModel(dense, Numerics(), family, Block(1, 2, 2))(first), seen[1])


@pytest.mark.parametrize("model_type", ["bitnet", "starcoder2", "nonesuch"])
def test_what_is_not_a_gated_mlp_is_refused(model_type: str, make_model: MakeModel, tmp_path: Path) -> None:
    """BitNet has a norm between its maps, the others have other maps."""
    config = {"model_type": model_type}
    if model_type != "nonesuch":
        config = read_config(make_model(tmp_path / "model", model_type=model_type))
    with pytest.raises(ConfigError, match=f"model family '{model_type}' is not known; known families: .*gate_proj"):
        family_of(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"hidden_size_per_layer_input": 0, "global_head_dim": 16}, r"\(head_dim\)", id="widths of heads"),
        pytest.param({"hidden_size_per_layer_input": 8}, r"\(hidden_size_per_layer_input\)", id="tokens read again"),
        pytest.param(
            {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1}, r"\(num_kv_shared_layers\)", id="shared keys"
        ),
    ],
)
def test_layers_that_are_no_stack_of_likes_are_refused(changes: dict[str, Any], reason: str) -> None:
    """Gemma 4's."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 8, "vocab_size": 300, **shape}
    with pytest.raises(ConfigError, match=f"each reading the one before and all of the same shape: .*{reason}"):
        family_of(config | changes)


def test_opt_without_biases_has_no_bias_to_repair_with() -> None:
    """The stock class would have them in attention, too."""
    config = {"model_type": "opt", "ffn_dim": 48, "hidden_size": 32, "num_hidden_layers": 1, "enable_bias": False}
    family = family_of(config)
    with pytest.raises(ConfigError, match=r"MLP biases, which this 'opt' does not have; use prune\.repair"):
        family.narrowed(config, {"layer-000.mlp": 24}, output_bias=True)
    assert family.narrowed(config, {"layer-000.mlp": 24}, output_bias=False)["ffn_dim"] == 24
