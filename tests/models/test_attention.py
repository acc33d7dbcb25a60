"""Removing KV groups equals silencing their query heads, for every family, evenly, per layer and with whole layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cria_dist import load_pruned
from cria_dist.models import checkpoint, surgery
from cria_dist.models.attention import LAYER_KV_HEADS, WHOLE
from cria_dist.models.checkpoint import Numerics, count_parameters, load_model, read_config
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.models.generic import NORMED_HEADS, WITH_HEADS
from cria_dist.models.mlp import SiteModules
from cria_dist.models.surgery import Surgery
from cria_dist.records import Site
from cria_dist.stages.observe import SiteObserver
from cria_dist.store.recording import Slice

MakeModel = Callable[..., Path]
Kept = dict[str, tuple[int, ...]]

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
MOE = {"num_experts_per_tok": 2}
GPT2 = {"n_inner": 48, "num_key_value_heads": None, "head_dim": None}
OWN_KEYS = {"num_attention_heads": 4, "num_key_value_heads": 4}
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
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
    "glm": {"model_type": "glm", **HEADS},
    "glm4-mha-no-bias": {"model_type": "glm4", "attention_bias": False, **OWN_KEYS},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, **HEADS},
    "phi3-mha": {"model_type": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.5, **OWN_KEYS},
    "gpt_neox": {"model_type": "gpt_neox", **OWN_KEYS},
    "gpt_neox-no-bias": {"model_type": "gpt_neox", "attention_bias": False, "use_parallel_residual": False, **OWN_KEYS},
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, **OWN_KEYS},
    "opt-no-bias": {"model_type": "opt", "ffn_dim": 48, "enable_bias": False, **POST_NORM, **OWN_KEYS},
    **{name: {"model_type": name, **HEADS, "head_dim": 4} for name in WITH_HEADS},
    "olmo2-mha": {"model_type": "olmo2", "tie_word_embeddings": False, "attention_bias": True, **OWN_KEYS},
    "stablelm-bias": {"model_type": "stablelm", "use_qkv_bias": True, **HEADS, "head_dim": 4},
    "granite-bias": {"model_type": "granite", "attention_bias": True, **HEADS},
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


@torch.no_grad()
def silence(model: torch.nn.Module, modules: SiteModules, name: str, mask_N: torch.Tensor) -> None:
    """Zero the removed units before a norm over all of them, and count the others only."""
    norm, made_by = model.get_submodule(name), {"q": "query", "k": "key"}[name.rpartition(".")[2][0]]
    share, rows = mask_N.float().mean().item(), len(norm.weight) // len(mask_N)
    for parameter in model.get_submodule(modules.inputs[made_by]).parameters():
        parameter[~mask_N.repeat_interleave(rows)] = 0
    norm.weight *= share**0.5
    norm.variance_epsilon *= share


def masked_logits(directory: Path, kept: Kept) -> torch.Tensor:
    """Of the dense model whose output maps read zeros of the removed heads and neurons."""
    model, config = load_model(directory, Numerics()), read_config(directory)
    dense, family = logits(model), family_of(config)
    for key, stay in kept.items():
        site = Site.from_key(key)
        width, span = family.widths(config, (site.part,))[site], family.span(site, config)
        mask_N = torch.isin(torch.arange(width), torch.tensor(stay)).repeat_interleave(span)
        modules = family.modules(site)
        for name in modules.norms:
            silence(model, modules, name, torch.isin(torch.arange(width), torch.tensor(stay)))
        output = model.get_submodule(modules.output)
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
    family = FAMILIES.get(settings.get("model_type", "vit"))
    takes = family.takes if family else "tokens"
    make = {"tokens": make_model, "sentences": make_encoder, "images": make_classifier}[takes]
    folder = make(tmp_path_factory.mktemp("dense") / request.param, **settings)
    if settings.get("model_type") in NORMED_HEADS:  # ones would hide whose weight is whose
        model = load_model(folder, Numerics())
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.data += 0.3 * torch.randn(len(parameter), generator=torch.Generator().manual_seed(1))
        model.save_pretrained(folder)
    return folder


def test_every_family_that_has_groups_is_tested() -> None:
    known = {name for name, family in FAMILIES.items() if "attention" in family.parts} | {*WITH_HEADS}
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


def test_a_token_alone_is_given_the_values_that_are_recorded(dense: Path) -> None:
    """It attends to nothing else, so every head hands its value on."""
    config, model = read_config(dense), load_model(dense, Numerics())
    family = family_of(config)
    if family.takes == "images":
        pytest.skip("an image is never one patch")
    for site, units in family.widths(config, ("attention",)).items():
        width, modules, stack = units * family.span(site, config), family.modules(site), family.stack(site, config)
        whole = Slice(0, width)
        observer = SiteObserver(whole, width, "float32", torch.device("cpu"), lambda signal_TN: signal_TN)
        for name in modules.recorded:
            hook = observer.input_hook(*family.signal_names(site, name), stack=stack, units=units)
            model.get_submodule(modules.seen_at(name)).register_forward_hook(hook)
        model.get_submodule(modules.output).register_forward_pre_hook(observer.output_hook)
        observer.reset(5)
        observer.begin(torch.arange(5))
        with torch.inference_mode():
            model(input_ids=TOKENS[:1, :5].T)
        found = {name: np.concatenate(tiles, axis=1) for name, tiles in observer.signals().items()}
        assert found.keys() == {"value", "output"}
        np.testing.assert_allclose(found["value"], found["output"], rtol=1e-5, atol=1e-6)


LONG = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 4.0], "rope_theta": 10000.0}
PHI3 = {"pad_token_id": 0, "head_dim": 4, "original_max_position_embeddings": 64, "rope_parameters": LONG}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "phi3"])
def test_heads_that_do_not_divide_the_hidden_size(model_type: str, make_model: MakeModel, tmp_path: Path) -> None:
    """6 heads, hidden 32: Llama's config refuses it, Mistral's says the same model; Gemma's has no such relative.

    Phi-3's does where factors of its rotary embedding are given, of which there must be hidden size / heads / 2.
    """
    own = PHI3 if model_type == "phi3" else {}
    dense = make_model(tmp_path / "dense", model_type=model_type, **HEADS, **own)
    kept = dict.fromkeys(EVEN, (0, 1, 3))
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, kept))
    config = read_config(tmp_path / "pruned")
    assert config["model_type"] == {"llama": "mistral"}.get(model_type, model_type)
    assert (LAYER_KV_HEADS in config) == (model_type in ("gemma2", "phi3"))
    loaded = load_pruned(tmp_path / "pruned")
    assert_equals(logits(loaded), masked_logits(dense, kept))
    if LAYER_KV_HEADS not in config:
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
