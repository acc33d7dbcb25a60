"""Runs that remove experts: from recording to checkpoint, recovery and report; and what cannot be asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cria_dist import load_pruned
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, CriaError
from cria_dist.files import read_json
from cria_dist.models import checkpoint
from cria_dist.models.checkpoint import Numerics, read_config
from cria_dist.models.experts import output_norms
from cria_dist.models.family import family_of
from cria_dist.models.sizes import sizes_of
from cria_dist.pipeline import Context, prune
from cria_dist.records import PruningPlan, Site
from cria_dist.stages.budget import held_out
from cria_dist.stages.evaluate import mean_loss
from cria_dist.stages.export_plan import apply_plan
from cria_dist.stages.prepare import prepare
from cria_dist.store.places import recorded
from cria_dist.store.site_scores import read_scores

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

EXPERTS = {"units": ["experts"], "repair": "none", "ratio": 0.33}


@pytest.fixture(scope="module")
def moe(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 6 experts, 2 for each token."""
    shape = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return make_model(tmp_path_factory.mktemp("moe") / "model", "qwen3_moe", **shape)


def run(run_config: RunConfigMaker, folder: Path, model: Path, prune: dict[str, Any], **changes: Any) -> RunConfig:
    return run_config(folder, model={"path": str(model)}, prune=EXPERTS | prune, **changes)


def by_hand(method: str, moe: Path, tokens_ST: np.ndarray) -> np.ndarray:
    """Scores of the experts of the second layer, from the model in memory."""
    model = checkpoint.load_model(moe, Numerics())
    block, found = model.model.layers[1].mlp, list[torch.Tensor]()
    if method == "magnitude":
        up_E, down_E = (
            one.double().flatten(1).norm(dim=1) for one in (block.experts.gate_up_proj, block.experts.down_proj)
        )
        return (up_E * down_E).detach().numpy()
    if method == "activation":
        block.experts.register_forward_pre_hook(lambda module, args: found.append(output_norms(module, *args)))
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(tokens_ST).long())
        return found[0].double().mean(dim=0).numpy()
    tokens = torch.from_numpy(tokens_ST[:2]).long()
    model(input_ids=tokens, labels=tokens).loss.backward()
    maps = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    return sum((one * one.grad).abs().double().flatten(1).sum(dim=1) for one in maps).detach().numpy()


@pytest.mark.parametrize("method", ["activation", "magnitude", "taylor", "random"])
def test_every_method_scores_experts(
    method: str, moe: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    sample = {"sequences": 2, "shard_sequences": 2} if method == "taylor" else {}
    context = make_context(run(run_config, tmp_path, moe, {}, method={"name": method, **sample}), until="apply")
    prune(context, until="apply")
    folder = context.job.folder
    plan = PruningPlan.from_json((folder / "pruned" / "plan.json").read_text())
    assert {key: len(kept) for key, kept in plan.kept.items()} == {f"layer-00{layer}.experts": 4 for layer in (0, 1)}
    assert plan.parameters == tuple(checkpoint.count_parameters(read_config(one)) for one in (moe, folder / "pruned"))
    AutoModelForCausalLM.from_pretrained(folder / "pruned")
    if method == "random":
        apply_plan(folder / "pruned" / "plan.json", str(moe), tmp_path / "again")
        files = [(one / checkpoint.WEIGHTS).read_bytes() for one in (tmp_path / "again", folder / "pruned")]
        assert files[0] == files[1]
    else:
        expected = by_hand(method, moe, np.load(folder / "tokens" / "calibration.npy"))
        found = read_scores(folder / "round-00", Site(1, "experts")).keep_N
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert plan.kept["layer-001.experts"] == tuple(sorted(np.argsort(-expected)[:4].tolist()))


def test_blocks_and_groups_and_two_rounds_record_the_same(
    moe: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """Layer by layer or whole; a second round scores what the first one left."""
    found = []
    for schedule in ("replicate", "sweep"):
        settings = {"units": ["experts", "attention"], "budget": "parameters", "ratio": 0.2, "rounds": 2}
        record = {"tokens": 128, "schedule": schedule}
        config = run(run_config, tmp_path / schedule, moe, settings, record=record, method={"name": "activation"})
        context = make_context(config, until="apply")
        prune(context, until="apply")
        found.append((context.job.folder / "round-01" / "manifest.json").read_bytes())
        sites = recorded(context.job.folder / "round-01")
        assert list(sites.signals(Site(0, "experts"))) == ["output"]
    assert found[0] == found[1]


@pytest.mark.parametrize("recover", [{"train": "mlp"}, {"lora_rank": 2}])
@pytest.mark.usefixtures("no_fresh_process")
def test_a_recovered_model_is_written_as_it_was_stored(
    recover: dict[str, Any],
    moe: Path,
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    settings = {"method": {"name": "activation"}, "evaluate": {"latency_repeats": 0, "prompts": []}}
    context = make_context(
        run(run_config, tmp_path, moe, {}, recover=recover, compare=[{"name": "random"}], **settings)
    )
    report = prune(context)
    assert report is not None
    before, after = (context.job.folder / name for name in ("pruned", "recovered"))
    assert checkpoint.weight_files(before) == checkpoint.weight_files(after)
    with checkpoint.open_tensors(before) as old, checkpoint.open_tensors(after) as new:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        assert torch.equal(old.read(name), new.read(name)) == ("lora_rank" in recover), "experts have no adapters"
    losses = {one.label: one.perplexity for one in report.variants}
    assert losses["recovered"] < losses["pruned"]


@pytest.fixture(scope="module")
def mixed(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, of which the second and the fourth have no experts."""
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1, 3]}
    return make_model(tmp_path_factory.mktemp("mixed") / "model", "qwen3_moe", num_hidden_layers=5, **shape)


LAYERS: dict[str, dict[str, Any]] = {
    "block_influence": {"method": {"name": "block_influence"}, "compare": [{"name": "mpruner"}]},
    "mpruner": {"method": {"name": "mpruner", "stop": "loss", "threshold": 50, "tau": 0.05}, "recover": {"steps": 0}},
    "mixed budget": {
        "prune": {"units": ["attention", "layer"], "allocation": "sensitivity", "ratio": 0.4, "protect": [1]},
        "method": {"name": "activation"},
        "recover": {"steps": 0},
    },
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.usefixtures("no_fresh_process")
def test_whole_layers_go(
    case: str,
    mixed: Path,
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    """What is left has experts in the layers that had them; the stock class loads it where KV groups are alike."""
    settings = {"ratio": 0.4, "budget": "parameters"} | LAYERS[case].get("prune", {})
    quick = {"record": {"schedule": "sweep"}, "evaluate": {"latency_repeats": 0, "prompts": []}}
    config = run_config(tmp_path, **LAYERS[case] | {"model": {"path": str(mixed)}, "prune": settings} | quick)
    context = make_context(config)
    report = prune(context)
    assert report is not None
    pruned = context.job.folder / "pruned"
    plan = PruningPlan.from_json((pruned / "plan.json").read_text())
    stay = [layer for layer in range(5) if plan.kept[f"layer-{layer:03d}.block"]]
    assert 0 < len(stay) < 5
    found = read_config(pruned)
    assert found["mlp_only_layers"] == [number for number, layer in enumerate(stay) if layer in (1, 3)]
    assert plan.parameters[1] == checkpoint.count_parameters(found)
    assert plan.ratio >= 0.4 or case == "mpruner", "which may stop before"
    load = load_pruned if case == "mixed budget" else AutoModelForCausalLM.from_pretrained
    assert len(load(pruned).model.layers) == len(stay)
    assert all(one.perplexity is not None and one.perplexity > 0 for one in (*report.variants, *report.comparison))


MIXES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"units": ["experts", "layer"], "ratio": 0.4}),
    "qwen3_moe": ("qwen3_moe", {"units": ["attention", "experts", "layer"], "ratio": 0.4}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "intermediate_size": 24},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}


@pytest.mark.parametrize("case", MIXES)
def test_experts_share_a_budget_with_layers_and_groups(
    case: str, make_model: Callable[..., Path], run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """By measured losses, which are those of the models that are written, and as many experts in all layers."""
    model_type, asked = MIXES[case]
    own = {"num_hidden_layers": 3, "num_experts_per_tok": 2, **SHAPES[model_type]}
    dense = make_model(tmp_path / "dense", model_type, **own)
    settings = {"budget": "parameters", "allocation": "sensitivity", "floor": 0.0, **asked}
    config = run(run_config, tmp_path, dense, settings, method={"name": "activation"}, recover={"steps": 0})
    context = make_context(config, until="apply")
    prune(context, until="apply")
    folder = context.job.folder
    facts = read_json(folder / "round-00" / "allocation.json")
    assert facts["losses"][facts["kept"]] == min(facts["losses"].values())
    plan = PruningPlan.from_json((folder / "pruned" / "plan.json").read_text())
    counts = {len(kept) for key, kept in plan.kept.items() if key.endswith("experts") and kept}
    assert len(counts) == 1
    assert counts < {2, 3, 4, 5, 6}
    pruned = read_config(folder / "pruned")
    assert plan.parameters == (checkpoint.count_parameters(read_config(dense)), checkpoint.count_parameters(pruned))
    assert plan.ratio >= asked["ratio"]
    unspent = facts["budget"]["left"] - facts["budget"]["spent"]["sensitivity"]
    assert 0 <= unspent < max(sizes_of(pruned, family_of(pruned)).layers), "another layer would have had room"
    load = load_pruned if "attention" in asked["units"] else AutoModelForCausalLM.from_pretrained
    model, tokens_ST = load(folder / "pruned"), np.load(folder / "tokens" / "calibration.npy")
    _, held = held_out(config)
    found = mean_loss(model, tokens_ST[held.start : held.stop], config.evaluate.batch_sequences)
    assert found == pytest.approx(facts["losses"][facts["kept"]], rel=1e-5)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"units": ["mlp"]}, {}, r"is a mixture, whose neurons stay; set prune\.units="),
    ({"ratio": 0.9}, {}, "leaves 0 of 6 units"),
    ({"ratio": 0.8}, {}, r"1 experts would be left in a layer, every token goes through 2"),
    ({"repair": "least_squares"}, {}, r"set prune\.repair=none, prune\.allocation=uniform"),
    ({"allocation": "global"}, {}, r"set prune\.repair=none, prune\.allocation=uniform"),
    ({"allocation": "sensitivity"}, {}, r"set prune\.repair=none, prune\.allocation=uniform and"),
    (
        {"units": ["experts", "layer"], "allocation": "sensitivity", "budget": "parameters", "protect": [0]},
        {},
        r"prune\.protect=\[0\]: all layers have the same number of experts",
    ),
    ({"budget": "macs"}, {}, r"a token goes through as many as before"),
    ({}, {"method": {"name": "wanda"}}, r"wanda .* does not score experts; choose activation, magnitude"),
    ({}, {"compare": [{"name": "block_influence"}]}, "block_influence does not score experts; choose activation"),
    ({}, {"method": {"name": "spectrum_preserving"}}, "spectrum_preserving knows no model of them"),
]


@pytest.mark.parametrize(("settings", "changes", "message"), REFUSED)
def test_what_cannot_be_done_with_experts(
    settings: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    moe: Path,
    run_config: RunConfigMaker,
    tmp_path: Path,
) -> None:
    with pytest.raises(CriaError, match=message):
        prepare(run(run_config, tmp_path, moe, settings, **({"method": {"name": "activation"}} | changes)))


def test_nothing_lost_units_where_layers_go(mixed: Path, run_config: RunConfigMaker, tmp_path: Path) -> None:
    method = {"method": {"name": "block_influence"}, "prune": {"ratio": 0.4}, "model": {"path": str(mixed)}}
    with pytest.raises(ConfigError, match=r"set recover\.train=blocks"):
        prepare(run_config(tmp_path, **method, recover={"train": "mlp"}))


def test_experts_where_all_layers_that_have_them_are_gone(
    moe: Path, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(moe, mlp_only_layers=[0, 1]))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(moe).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no layer of this model has experts; set prune\.units=\['attention'\]"):
        prepare(run(run_config, tmp_path, tmp_path / "model", {}, method={"name": "activation"}))


def test_experts_of_a_model_that_has_none(pico: Path, run_config: RunConfigMaker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of model_type 'llama', .* can be pruned, experts cannot; leave it out"):
        prepare(run(run_config, tmp_path, pico, {}, method={"name": "activation"}))
