"""Runs that set single weights to zero, end to end in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, PlanError
from cria_dist.models import checkpoint
from cria_dist.models.sparse import read_sparse
from cria_dist.pipeline import Context, prune
from cria_dist.records import PruningPlan
from cria_dist.report.writer import report_from_json
from cria_dist.stages.redraw import site_evidence
from cria_dist.stages.sparsify import sparse_names

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]
SP = {"name": "spectrum_preserving"}
WEIGHTS = 2 * 3 * 32 * 48
"""Weights of the MLPs of the pico model."""


def plan_of(folder: Path) -> PruningPlan:
    return PruningPlan.from_json((folder / "plan.json").read_text())


def zeros(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / checkpoint.WEIGHTS)
    return {name: tensors[name] == 0 for name in sorted(sparse_names(directory))}


@pytest.fixture(scope="session")
def finished(run_config: RunConfigMaker, make_context: MakeContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole run at half of the weights, with two steps of recovery; not to be written to."""
    compare = [{**SP, "truncate": 1}, {"name": "random"}, {"name": "block_influence"}]
    root = tmp_path_factory.mktemp("weights")
    config = run_config(root, method=SP, prune={"ratio": 0.5}, compare=compare, recover={"steps": 2})
    context = make_context(config)
    prune(context, "python -m pytest")
    context.progress.close("done")
    return context.job.folder


def test_what_is_measured_of_a_whole_run(finished: Path) -> None:
    report = report_from_json(finished / "report.json")
    plain = ["dense", "pruned", "recovered"]  # there is nothing to repair
    assert [(one.label, one.repair) for one in report.variants] == [(label, "none") for label in plain]
    assert [(one.label, one.repair) for one in report.comparison] == [
        ("spectrum_preserving, truncate=1", "none"),
        ("random", "none"),
        ("random", "least_squares"),
        ("block_influence", "none"),
    ]
    assert len({one.perplexity for one in (*report.variants, report.comparison[0])}) == 4
    plan = plan_of(finished / "pruned")
    assert {one.parameters for one in report.variants} == {plan.parameters[0]}
    assert report.effective_parameter_reduction == plan.ratio


def test_zeros_are_as_many_as_asked_for_and_survive_the_recovery(finished: Path, pico: Path) -> None:
    plan, masks = plan_of(finished / "pruned"), zeros(finished / "pruned")
    assert sum(int(mask.sum()) for mask in masks.values()) == WEIGHTS // 2 == plan.parameters[0] - plan.parameters[1]
    assert plan.ratio == WEIGHTS / 2 / plan.parameters[0]
    assert all(kept == tuple(range(48)) for kept in plan.kept.values())
    assert not any(bool(mask.any()) for mask in zeros(pico).values())
    after = zeros(finished / "recovered")
    assert all(after[name].equal(mask) for name, mask in masks.items())


def test_stock_transformers_loads_it_and_only_the_maps_changed(finished: Path, pico: Path) -> None:
    masks = zeros(finished / "pruned")
    old, new = load_file(pico / checkpoint.WEIGHTS), load_file(finished / "pruned" / checkpoint.WEIGHTS)
    assert all(new[name].equal(old[name]) for name in old.keys() - masks.keys())
    stock = AutoModelForCausalLM.from_pretrained(finished / "pruned")
    assert all(stock.state_dict()[name].eq(0).equal(mask) for name, mask in masks.items())
    loaders = report_from_json(finished / "report.json").loaders
    equal = {name for name, finding in loaders.items() if "logits equal" in finding}
    assert {"transformers, pruned", "transformers, recovered"} <= equal
    assert {"sparse copy, pruned", "sparse copy, recovered"} <= set(loaders) - equal


@pytest.mark.parametrize("name", ["pruned", "recovered"])
def test_the_compressed_copy_is_smaller_and_expands_to_the_same(finished: Path, name: str) -> None:
    expanded = read_sparse(finished / "compressed" / name / "model.sparse.safetensors")
    original = load_file(finished / name / checkpoint.WEIGHTS)
    assert expanded.keys() == original.keys()
    assert all(expanded[key].equal(original[key]) for key in original)
    sizes = json.loads((finished / "compressed" / name / "sparse.json").read_text())
    assert sizes["dense_bytes"] - sizes["bytes"] > 0.9 * WEIGHTS * (4 / 2 - 1 / 8)


def test_the_report_speaks_of_zeros(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "spectral error" in page
    assert "of the 25,120 parameters to zero" in page
    report = report_from_json(finished / "report.json")
    assert any(sentence.startswith("Single weights") for sentence in report.protocol)
    assert {path.stem for path in (finished / "plots").iterdir()} == {"perplexity", "loss", "stages"}
    evidence = site_evidence(finished / "round-00", plan_of(finished / "pruned"))
    assert [one.scores.facts["sparsity"] for one in evidence] == [0.5, 0.5]


def test_a_run_is_resumed_without_work_and_a_lost_mask_is_made_again(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, method=SP, prune={"ratio": 0.3})
    first = make_context(config, until="apply")
    prune(first, until="apply")
    folder = first.job.folder
    files = [*folder.glob("round-00/masks/*"), *folder.glob("pruned/*"), *folder.glob("compressed/pruned/*")]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert len(files) > 7
    prune(make_context(config, until="apply"), until="apply")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    lost = folder / "round-00" / "masks" / "layer-001.mlp.safetensors"
    lost.unlink()
    prune(make_context(config, until="apply"), until="apply")
    assert lost.read_bytes() == before[lost][0]
    changed = {path for path in files if path.stat().st_mtime_ns != before[path][1]}
    assert changed == {lost}


def test_what_is_asked_for_in_parameters_and_macs_is_hit(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    for budget, total in (("parameters", 25120), ("macs", 25120 - 5 * 32 + 2 * 2 * 32 * 32)):
        config = run_config(tmp_path, method=SP, prune={"ratio": 0.1, "budget": budget}, name=budget)
        context = make_context(config, until="decide")
        prune(context, until="decide")
        dense, left = plan_of(context.job.folder / "round-00").parameters
        assert abs(dense - left - 0.1 * total) <= 3  # half a weight in each of 6 maps


def test_the_seed_and_nothing_else_changes_the_zeros(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for name, changes in (("one", {}), ("two", {}), ("three", {"seed": 1})):
        config = run_config(tmp_path, method=SP, name=name, **changes)
        context = make_context(config, until="apply")
        prune(context, until="apply")
        found.append(zeros(context.job.folder / "pruned"))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
    assert not any(found[0][name].equal(found[2][name]) for name in found[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"ratio": 0.9999}}, r"prune\.ratio=0\.9999 of 9,216 weights leaves nothing of the .*lower prune\.r"),
        ({"prune": {"ratio": 0.6, "budget": "parameters"}}, r"of all 25,120 parameters leaves nothing"),
        ({"prune": {"ratio": 1e-5}}, r"makes none of 1,536 weights of a map zero; raise prune\.ratio"),
        ({"prune": {"rounds": 2}}, r"spectrum_preserving looks at the weights only.*set prune\.rounds=1"),
        ({"prune": {"allocation": "global"}}, r"allocation=global .*another kind; use prune\.allocation=uniform"),
        ({"prune": {"allocation": "sensitivity"}}, r"allocation=sensitivity .* use prune\.allocation=uniform"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    changes: dict[str, Any], message: str, run_config: RunConfigMaker, make_context: Any, tmp_path: Path
) -> None:
    config = run_config(tmp_path, **{"method": SP, **changes})
    with pytest.raises((ConfigError, PlanError), match=message):
        make_context(config)
    assert not (tmp_path / "runs").exists()
