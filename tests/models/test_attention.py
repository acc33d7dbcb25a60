"""Removing KV groups equals silencing their query heads, for every family, evenly, per layer and with whole layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cria_dist import load_pruned
from cria_dist.models import checkpoint, surgery
from cria_dist.models.attention import LAYER_KV_HEADS, WHOLE
from cria_dist.models.checkpoint import Numerics, count_parameters, load_model, read_config
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.models.surgery import Surgery
from cria_dist.records import Site

MakeModel = Callable[..., Path]
Kept = dict[str, tuple[int, ...]]

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
MOE = {"num_experts_per_tok": 2}
GPT2 = {"n_inner": 48, "num_key_value_heads": None, "head_dim": None}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **HEADS},
    "llama-bias": {"model_type": "llama", "attention_bias": True, **HEADS},
    "llama-mha": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, **HEADS},
    "qwen2": {"model_type": "qwen2", **HEADS},
    "qwen3": {"model_type": "qwen3", **HEADS},
    "gemma2": {"model_type": "gemma2", **HEADS},
    "gemma3_text": {"model_type": "gemma3_text", **HEADS},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **HEADS},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, **MOE, **HEADS},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-untied": {"model_type": "gpt2", "tie_word_embeddings": False, **GPT2},
    "bert": {"model_type": "bert", "num_hidden_layers": 2},
    "roberta": {"model_type": "roberta", "num_hidden_layers": 2},
    "distilbert": {"model_type": "distilbert", "num_hidden_layers": 2, "hidden_dim": 48},
    "vit": {"num_hidden_layers": 2},
    "vit-no-bias": {"num_hidden_layers": 2, "qkv_bias": False},
}
EVEN: Kept = {"layer-000.attention": (0, 3), "layer-001.attention": (1, 2)}
UNEVEN: Kept = {"layer-000.attention": (0, 2, 3), "layer-001.attention": (1,)}
MIXED: Kept = {**UNEVEN, "layer-000.mlp": tuple(range(8, 40)), "layer-001.mlp": tuple(range(0, 48, 2))}


def operation(directory: Path, kept: Kept) -> Surgery:
    config = read_config(directory)
    return Surgery(family_of(config), config, kept)


def logits(model: torch.nn.Module) -> torch.Tensor:
    inputs = {"pixel_values": PIXELS} if model.main_input_name == "pixel_values" else {"input_ids": TOKENS}
    with torch.inference_mode():
        return model(**inputs).logits.float()


def masked_logits(directory: Path, kept: Kept) -> torch.Tensor:
    """Of the dense model whose output maps read zeros of the removed heads and neurons."""
    model, config = load_model(directory, Numerics()), read_config(directory)
    dense, family = logits(model), family_of(config)
    for key, stay in kept.items():
        site = Site.from_key(key)
        width, span = family.widths(config, (site.part,))[site], family.span(site, config)
        mask_N = torch.isin(torch.arange(width), torch.tensor(stay)).repeat_interleave(span)
        output = model.get_submodule(family.modules(site).output)
        output.register_forward_pre_hook(lambda _, args, mask_N=mask_N: (args[0] * mask_N,))
    masked = logits(model)
    assert (masked - dense).abs().max() > 1e-2, "the removed units do nothing: this test could not fail"
    return masked


def assert_equals(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (found - expected).abs().max()


@pytest.fixture(scope="module", params=MODELS, ids=str)
def dense(
    request: pytest.FixtureRequest,
    make_model: MakeModel,
    make_encoder: MakeModel,
    make_classifier: MakeModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    settings = MODELS[request.param]
    takes = FAMILIES[settings.get("model_type", "vit")].takes
    make = {"tokens": make_model, "sentences": make_encoder, "images": make_classifier}[takes]
    return make(tmp_path_factory.mktemp("dense") / request.param, **settings)


def test_every_family_that_has_groups_is_tested() -> None:
    known = {name for name, family in FAMILIES.items() if "attention" in family.parts}
    assert known == {model.get("model_type", "vit") for model in MODELS.values()}


@pytest.mark.parametrize("kept", [EVEN, UNEVEN, MIXED], ids=["even", "uneven", "mixed"])
def test_removing_equals_masking(dense: Path, kept: Kept, tmp_path: Path) -> None:
    if kept is MIXED and "mlp" not in family_of(read_config(dense)).parts:
        kept = UNEVEN  # beside experts: tests/models/test_experts.py
    expected = masked_logits(dense, kept)
    assert_equals(logits(surgery.pruned_copy(load_model(dense, Numerics()), operation(dense, kept))), expected)
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, kept))
    pruned = load_pruned(tmp_path / "pruned")
    assert_equals(logits(pruned), expected)
    if pruned.can_generate():
        written = pruned.generate(TOKENS[:1], attention_mask=torch.ones(1, 20), max_new_tokens=3, min_new_tokens=3)
        assert written.shape == (1, 23)
    pruned.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(pruned))


def test_equal_groups_load_as_the_stock_class_where_it_has_a_word_for_them(dense: Path, tmp_path: Path) -> None:
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, EVEN))
    config = read_config(tmp_path / "pruned")
    assert (LAYER_KV_HEADS in config) == (config["model_type"] in WHOLE)
    if config["model_type"] in WHOLE:
        return
    stock = checkpoint.stock_class(config)
    model, found = stock.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(found.values())
    assert type(model).__name__ == type(load_model(dense, Numerics())).__name__
    assert_equals(logits(model.eval()), masked_logits(dense, EVEN))


def test_a_group_costs_what_leaves_with_it(dense: Path, tmp_path: Path) -> None:
    config = read_config(dense)
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, UNEVEN))
    left = count_parameters(read_config(tmp_path / "pruned"))
    assert count_parameters(config) - left == 4 * family_of(config).unit_cost(Site(0, "attention"), config)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_heads_that_do_not_divide_the_hidden_size(model_type: str, make_model: MakeModel, tmp_path: Path) -> None:
    """6 heads, hidden 32: Llama's config refuses it, Mistral's says the same model; Gemma's has no such relative."""
    dense = make_model(tmp_path / "dense", model_type=model_type, **HEADS)
    kept = dict.fromkeys(EVEN, (0, 1, 3))
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, kept))
    config = read_config(tmp_path / "pruned")
    assert config["model_type"] == {"llama": "mistral"}.get(model_type, model_type)
    assert (LAYER_KV_HEADS in config) == (model_type == "gemma2")
    loaded = load_pruned(tmp_path / "pruned")
    assert_equals(logits(loaded), masked_logits(dense, kept))
    if model_type != "gemma2":
        assert_equals(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()), logits(loaded))


def test_groups_and_whole_layers_go_together(make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=3, **HEADS)
    kept: Kept = {
        "layer-000.attention": (0, 2),
        "layer-001.attention": (),
        "layer-002.attention": (3,),
        "layer-000.block": (0,),
        "layer-001.block": (),
        "layer-002.block": (0,),
    }
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, kept))
    assert read_config(tmp_path / "pruned")[LAYER_KV_HEADS] == [2, 1]
    model = load_model(dense, Numerics())
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    model.model.layers[1].self_attn.layer_idx = 1
    model.config.num_hidden_layers = 2
    with torch.no_grad():
        for layer, removed in ((0, (1, 3)), (1, (0, 1, 2))):
            for group in removed:
                model.model.layers[layer].self_attn.o_proj.weight[:, group * 16 : group * 16 + 16] = 0
    assert_equals(logits(load_pruned(tmp_path / "pruned")), logits(model))


def test_pruned_again(make_model: MakeModel, tmp_path: Path) -> None:
    """A model whose layers differ is an ordinary input."""
    dense = make_model(tmp_path / "dense", **HEADS)
    surgery.write_pruned(dense, tmp_path / "once", operation(dense, UNEVEN))
    again = {"layer-000.attention": (1,), "layer-001.attention": (0,)}
    surgery.write_pruned(tmp_path / "once", tmp_path / "twice", operation(tmp_path / "once", again))
    config = read_config(tmp_path / "twice")
    assert LAYER_KV_HEADS not in config
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    both = {"layer-000.attention": (2,), "layer-001.attention": (1,)}
    assert_equals(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()), masked_logits(dense, both))
    assert checkpoint.is_complete(tmp_path / "twice")
