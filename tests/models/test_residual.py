"""Dimensions of the residual stream: what leaves, what is left, and that it is what the norms' scale says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cria_dist.maths.repair import norm_scale
from cria_dist.models import residual
from cria_dist.models.checkpoint import Numerics, count_parameters, load_model, read_config
from cria_dist.models.experts import assembled, taken_apart
from cria_dist.models.family import family_of
from cria_dist.models.macs import macs_per_position
from cria_dist.models.surgery import Surgery, pruned_copy, write_pruned
from cria_dist.records import Moments

MakeModel = Callable[..., Path]
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.3}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
VARIANTS = {
    "llama": {"tie_word_embeddings": True},
    "llama-biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "attention_bias": True},
    "phi3": {"tie_word_embeddings": False, "pad_token_id": 0},
    "glm": {"tie_word_embeddings": False},
    "glm-unbiased": {"tie_word_embeddings": True, "attention_bias": False},
    "smollm3": {"tie_word_embeddings": True, "attention_bias": True, "pad_token_id": 0},
    "granite": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, **GRANITE},
    "granite-untied": {"tie_word_embeddings": False, **GRANITE},
    "ernie4_5": {"tie_word_embeddings": True, "use_bias": True},
    "seed_oss": {"tie_word_embeddings": False, "attention_out_bias": True, "pad_token_id": 0},
    "mixtral": {"num_local_experts": 3, **EXPERTS},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "mlp_only_layers": [1],
        "attention_bias": True,
        **EXPERTS,
    },
    "gemma2": {"tie_word_embeddings": True},
    "gemma2-untied": {"tie_word_embeddings": False, "attention_bias": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "glm4": {"tie_word_embeddings": False},
    "olmo2": {"tie_word_embeddings": True, "attention_bias": True},
    "olmo3": {"tie_word_embeddings": False},
}
"""By model type, and what is special."""


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def dense(request: pytest.FixtureRequest, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose norms all differ."""
    model_type = request.param.partition("-")[0]
    folder = tmp_path_factory.mktemp("dense") / model_type
    path = make_model(folder, model_type=model_type, **VARIANTS[request.param]) / "model.safetensors"
    spread = {name: one + 0.3 * torch.randn_like(one) * ("norm" in name) for name, one in load_file(path).items()}
    save_file(spread, path, metadata={"format": "pt"})
    return folder


def plan_for(config: dict[str, Any], left: int) -> dict[str, tuple[int, ...]]:
    """Every third dimension goes, from the first on, until there are ``left``."""
    hidden = config["hidden_size"]
    kept = tuple(sorted({*range(hidden)} - {*range(0, 3 * (hidden - left), 3)}))
    return {site.key: kept for site in family_of(config).widths(config, residual.READ)}


def mask(model: torch.nn.Module, config: dict[str, Any], kept: tuple[int, ...]) -> None:
    """Zero what carries other dimensions; norms become such that count those that are left, and scale so."""
    family, hidden = family_of(config), config["hidden_size"]
    share, stays = len(kept) / hidden, torch.zeros(hidden)
    stays[list(kept)] = 1
    sites = family.widths(config, residual.READ)
    dims = {name: dim for site in sites for name, dim in family.coupled_tensors(site, config).items()}
    for name, parameter in model.named_parameters():
        if pieces := family.pieces(name, parameter.shape):
            parts = taken_apart(pieces, parameter)
            masked = {one: part * (stays if dims[one] else stays[:, None]) for one, part in parts.items()}
            parameter.copy_(assembled(pieces, masked.__getitem__))
        elif (stored := family.on_disk(name)) in dims and "norm" not in name:
            parameter.mul_(stays if dims[stored] or parameter.ndim == 1 else stays[:, None])
        elif stored in dims:
            norm, one = model.get_submodule(name.removesuffix(".weight")), float("gemma" in config["model_type"])
            parameter.copy_((parameter + one) * share**0.5 * stays - one)
            epsilon = "eps" if hasattr(norm, "eps") else "variance_epsilon"
            setattr(norm, epsilon, getattr(norm, epsilon) * share)


@torch.no_grad()
def test_masked_is_removed(dense: Path, tmp_path: Path) -> None:
    """Dimensions that are zero everywhere, behind norms that count only the others, are the smaller model."""
    config, model = read_config(dense), load_model(dense, Numerics())
    left, whole = config["hidden_size"] - 8, model(TOKENS).logits
    kept = plan_for(config, left)
    surgery = Surgery(family_of(config), config, kept)
    removed = pruned_copy(model, surgery)
    write_pruned(dense, tmp_path / "pruned", surgery)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert again.config.hidden_size == left
    mask(model, config, kept["layer-000.residual_mlp"])
    expected = model(TOKENS).logits
    assert (expected - whole).abs().max() > 0.1
    assert (removed(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max().clip(1)
    assert torch.equal(again(TOKENS).logits, removed(TOKENS).logits)
    assert again.generate(TOKENS[:1], max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_what_a_dimension_costs(dense: Path) -> None:
    check_costs(read_config(dense))


def test_what_it_costs_where_layers_have_different_widths(pico: Path) -> None:
    check_costs({**read_config(pico), "intermediate_size_per_layer": [48, 20]})


def check_costs(config: dict[str, Any]) -> None:
    """Parameters and multiplications that leave with 8 dimensions."""
    family = family_of(config)
    narrow = Surgery(family, config, plan_for(config, config["hidden_size"] - 8)).pruned_config()
    sites = family.widths(config, residual.READ)
    cost = sum(family.unit_cost(site, config) for site in sites)
    assert count_parameters(config) - count_parameters(narrow) == 8 * cost
    macs = sum(family.unit_macs(site, config, 20) for site in sites)
    assert macs_per_position(config, family, 20) - macs_per_position(narrow, family_of(narrow), 20) == 8 * macs


def test_the_root_is_rounded_as_the_stock_class_rounds_it() -> None:
    """Of 2240 and 2304 dimensions in bfloat16: 47.25, not 47.33, and 48."""
    embedding = torch.linspace(-1, 1, 101).to(torch.bfloat16)
    found = residual.Rescaling(2304, 2240).of(embedding)
    assert torch.equal(found, (embedding.double() * 48 / 47.25).to(torch.bfloat16))
    assert not torch.equal(found, (embedding.double() * (2304 / 2240) ** 0.5).to(torch.bfloat16))


def test_the_scale_of_a_norm_keeps_the_size_of_what_stays() -> None:
    rng = np.random.default_rng(0)
    gain_N, stream_TN = rng.uniform(0.5, 2, 24), rng.normal(size=(400, 24)) * rng.uniform(0.2, 3, 24)
    normed_TN = gain_N * stream_TN / np.sqrt(np.square(stream_TN).mean(axis=1, keepdims=True))
    kept_S = np.arange(3, 24)
    moments = Moments(400, normed_TN.sum(axis=0), normed_TN.T @ normed_TN)
    scale = norm_scale(gain_N, moments, kept_S)
    after_TS = gain_N[kept_S] * stream_TN[:, kept_S]
    after_TS *= scale / np.sqrt(np.square(stream_TN[:, kept_S]).mean(axis=1, keepdims=True))
    before, after = (np.sqrt(np.square(one / gain_N[kept_S]).mean()) for one in (normed_TN[:, kept_S], after_TS))
    assert after == pytest.approx(before, rel=1e-9)
