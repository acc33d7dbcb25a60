"""Runs that remove dimensions of the residual stream, of families that read and write it in different ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cria_dist.config import RunConfig
from cria_dist.models.checkpoint import WEIGHTS, Numerics, count_parameters, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.residual import READ
from cria_dist.models.surgery import Surgery, pruned_copy
from cria_dist.pipeline import Context, prune
from cria_dist.records import PruningPlan

ASKED: dict[str, Any] = {
    "prune": {"units": ["residual"], "ratio": 0.2, "multiple": 8},
    "method": {"name": "activation"},
}
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"pad_token_id": 0},
    "gemma2": {},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmo2": {"tie_word_embeddings": False},
}


def logits(model: torch.nn.Module, tokens_ST: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens_ST).logits


@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_left_is_repaired(
    model_type: str,
    make_model: Callable[..., Path],
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Context],
    tmp_path: Path,
) -> None:
    """The stock class loads it, it is what the same surgery gives in memory, and nearer to the dense model."""
    folder = make_model(tmp_path / "dense", model_type=model_type, **MODELS[model_type])
    context = make_context(run_config(tmp_path, model={"path": str(folder)}, **ASKED), until="apply")
    prune(context, until="apply")
    run, pruned, config = context.job.folder, context.job.folder / "pruned", read_config(folder)
    plan = PruningPlan.from_json((pruned / "plan.json").read_text())
    kept = plan.kept["layer-000.residual_mlp"]
    assert set(plan.kept.values()) == {kept}
    assert len(kept) == 24
    assert plan.parameters == (count_parameters(config), count_parameters(read_config(pruned)))
    tokens_ST = torch.from_numpy(np.load(run / "tokens" / "calibration.npy")).long()
    dense, stock = load_model(folder, Numerics()), AutoModelForCausalLM.from_pretrained(pruned).eval()
    family = family_of(config)
    surgeries = [Surgery(family, config, plan.kept, where) for where in (None, run / "round-00" / "repair")]
    solved_names = {name for site in family.widths(config, READ) for name in family.solved(site, config)}
    assert surgeries[1].replacements().keys() == solved_names
    bare, repaired = (pruned_copy(dense, surgery) for surgery in surgeries)
    whole, cut, solved = (logits(model, tokens_ST) for model in (dense, bare, repaired))
    assert torch.equal(logits(stock, tokens_ST), solved)
    assert (solved - whole).square().mean() < 0.8 * (cut - whole).square().mean()
    if model_type == "gemma2":
        check_norm_behind(dense, load_file(pruned / WEIGHTS), tokens_ST, list(kept))


def check_norm_behind(
    dense: torch.nn.Module, left: dict[str, torch.Tensor], tokens_ST: torch.Tensor, kept: list[int]
) -> None:
    """Its gain keeps the size of what stays, of what attention writes."""
    name, seen = "model.layers.1.post_attention_layernorm", list[torch.Tensor]()
    norm = dense.get_submodule(name)
    norm.register_forward_hook(lambda _module, _args, output: seen.append(output / (1 + norm.weight)))
    logits(dense, tokens_ST)
    energy_N = seen[0].double().square().sum(dim=(0, 1))
    share = energy_N[kept].sum() / energy_N.sum()
    expected = (1 + norm.weight[kept]) * (share * len(energy_N) / len(kept)).sqrt() - 1
    torch.testing.assert_close(left[f"{name}.weight"], expected.detach().float(), rtol=1e-4, atol=1e-5)


def test_a_run_removes_the_same_dimensions_everywhere_and_repairs_the_readers(
    make_model: Callable[..., Path],
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Context],
    tmp_path: Path,
) -> None:
    folder = make_model(tmp_path / "dense", model_type="llama")
    asked = {"units": ["residual"], "ratio": 0.2, "multiple": 8}
    config = run_config(
        tmp_path,
        model={"path": str(folder)},
        prune=asked,
        method={"name": "activation"},
        compare=[{"name": "random"}],
        recover={"steps": 0},
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
