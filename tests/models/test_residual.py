"""Dimensions of the residual stream: what leaves, what is left, and that it is what the norms' scale says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cria_dist.config import RunConfig
from cria_dist.errors import CriaError
from cria_dist.maths.repair import norm_scale
from cria_dist.models import residual
from cria_dist.models.checkpoint import Numerics, count_parameters, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.macs import macs_per_position
from cria_dist.models.surgery import Surgery, pruned_copy, write_pruned
from cria_dist.pipeline import Context, prune
from cria_dist.records import Moments, PruningPlan
from cria_dist.stages.prepare import prepare

MakeModel = Callable[..., Path]
RunConfigMaker = Callable[..., RunConfig]
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
VARIANTS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
]


def plan_for(config: dict[str, Any], left: int) -> dict[str, tuple[int, ...]]:
    """Every third dimension goes, from the first on, until there are ``left``."""
    hidden = config["hidden_size"]
    gone = {*range(0, hidden, 3)} if left is None else {*range(0, 3 * (hidden - left), 3)}
    return dict.fromkeys((site.key for site in residual.sites(config)), tuple(sorted({*range(hidden)} - gone)))


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_masked_is_removed(model_type: str, changes: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    """Dimensions that are zero everywhere, behind norms that count only the others, are the smaller model."""
    folder = make_model(tmp_path / "dense", model_type=model_type, **changes)
    config = read_config(folder)
    hidden, left = config["hidden_size"], config["hidden_size"] - 8
    family, kept = family_of(config), plan_for(config, left)
    model, stays = load_model(folder, Numerics()), torch.zeros(hidden)
    stays[list(kept["layer-000.residual_mlp"])] = 1
    surgery = Surgery(family, config, kept)
    removed = pruned_copy(model, surgery)
    write_pruned(folder, tmp_path / "pruned", surgery)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert again.config.hidden_size == left
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dims = {
                name: dim
                for site in residual.sites(config)
                for name, dim in family.coupled_tensors(site, config).items()
            }
            if name in dims:
                parameter.mul_(stays if dims[name] or parameter.ndim == 1 else stays[:, None])
        for module in model.modules():
            if "RMSNorm" in type(module).__name__ and module.weight.numel() == hidden:
                module.weight.mul_((left / hidden) ** 0.5)  # the mean is over those that are there
                module.variance_epsilon *= left / hidden
        expected = model(TOKENS).logits
        assert (removed(TOKENS).logits - expected).abs().max() < 1e-5
        assert (again(TOKENS).logits - expected).abs().max() < 1e-5
    assert again.generate(TOKENS[:1], max_new_tokens=3, do_sample=False).shape == (1, 23)


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_what_a_dimension_costs(
    model_type: str, changes: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    config = read_config(make_model(tmp_path / "dense", model_type=model_type, **changes))
    family = family_of(config)
    narrow = Surgery(family, config, plan_for(config, config["hidden_size"] - 8)).pruned_config()
    sites = residual.sites(config)
    cost = sum(family.unit_cost(site, config) for site in sites)
    assert count_parameters(config) - count_parameters(narrow) == 8 * cost
    macs = sum(family.unit_macs(site, config, 20) for site in sites)
    assert macs_per_position(config, family, 20) - macs_per_position(narrow, family_of(narrow), 20) == 8 * macs


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


def test_a_run_removes_the_same_dimensions_everywhere_and_repairs_the_readers(
    make_model: MakeModel, run_config: RunConfigMaker, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "dense", model_type="llama")
    asked = {"units": ["residual"], "ratio": 0.2, "multiple": 8}
    config = run_config(
        tmp_path, model={"path": str(folder)}, prune=asked, method={"name": "activation"}, compare=[{"name": "random"}]
    )
    context = make_context(config)
    report = prune(context)
    plan = PruningPlan.from_json((context.job.folder / "round-00" / "plan.json").read_text())
    assert len(set(plan.kept.values())) == 1
    assert len(plan.kept["layer-000.residual_mlp"]) % 8 == 0
    _, pruned, repaired, *_ = report.variants
    assert repaired.perplexity < pruned.perplexity
    assert repaired.parameters == plan.parameters[1]
    verdicts = [verdict for name, verdict in report.loaders.items() if name.startswith("transformers")]
    assert verdicts
    assert all("equal" in verdict for verdict in verdicts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"units": ["residual", "mlp"]}}, "residual alone|stands alone"),
        ({"prune": {"units": ["residual"], "allocation": "global"}}, "stands alone"),
        ({"prune": {"units": ["residual"]}, "method": {"name": "wanda"}}, "runs through all"),
        ({"prune": {"units": ["residual"], "budget": "kv_cache"}}, "kv_cache is spent on attention"),
    ],
)
def test_what_does_not_apply(changes: dict[str, Any], message: str, run_config: RunConfigMaker, tmp_path: Path) -> None:
    with pytest.raises((ValueError, CriaError), match=message):
        prepare(run_config(tmp_path, **({"method": {"name": "random"}, "compare": []} | changes)))


def test_a_family_whose_layers_norm_what_they_write(
    make_model: MakeModel, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "dense", model_type="gemma2")
    config = run_config(
        tmp_path, model={"path": str(folder)}, prune={"units": ["residual"]}, method={"name": "random"}, compare=[]
    )
    with pytest.raises(CriaError, match="is for llama, mistral, qwen2, qwen3"):
        prepare(config)
