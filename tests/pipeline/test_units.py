"""Runs that remove KV groups, alone, beside neurons and beside whole layers: from recording to checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cria_dist import load_pruned
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, CriaError
from cria_dist.models import checkpoint
from cria_dist.models.attention import LAYER_KV_HEADS
from cria_dist.models.checkpoint import Numerics, read_config
from cria_dist.models.family import family_of
from cria_dist.models.mlp import signals_of
from cria_dist.pipeline import Context, prune
from cria_dist.records import PruningPlan, Site, Stage
from cria_dist.stages.prepare import prepare
from cria_dist.store.places import recorded

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]
MakeModel = Callable[..., Path]

METHODS = ("conditional", "activation", "wanda", "flap", "taylor", "magnitude", "random", "cria")
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256


@pytest.fixture(scope="module")
def heads(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of 4 KV groups with 2 query heads each, the last of them copies of the first."""
    folder = tmp_path_factory.mktemp("heads") / "model"
    return make_model(folder, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)


def carry_out(make_context: MakeContext, config: RunConfig, until: Stage = "apply") -> tuple[Path, Any]:
    context = make_context(config, until=until)
    prune(context, until=until)
    folder = context.job.folder
    return folder, plan_of(folder)


def plan_of(folder: Path) -> PruningPlan | None:
    path = folder / "round-00" / "plan.json"
    return PruningPlan.from_json(path.read_text()) if path.is_file() else None


def run(run_config: RunConfigMaker, folder: Path, model: Path, prune: dict[str, Any], **changes: Any) -> RunConfig:
    return run_config(folder, model={"path": str(model)}, prune={"ratio": 0.25, "multiple": 4} | prune, **changes)


def test_the_signals_of_a_group_are_what_the_output_map_reads(
    heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """Moments against the model's own forward pass; values are repeated for each query head that reads them."""
    folder, _ = carry_out(make_context, run(run_config, tmp_path, heads, {"units": ["attention"]}), "record")
    site, recording = Site(1, "attention"), recorded(folder / "round-00")
    model, seen, values = checkpoint.load_model(heads, Numerics()), [], []
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    attention.v_proj.register_forward_hook(lambda *args: values.append(args[2].flatten(0, 1)))
    tokens_ST = np.load(folder / "tokens" / "calibration.npy")
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(tokens_ST).long())
    seen_TN = torch.cat(seen).double().numpy()
    moments = recording.moments(site)
    assert moments.count == tokens_ST.size
    np.testing.assert_allclose(moments.gram_NN, seen_TN.T @ seen_TN, rtol=1e-4, atol=1e-3)
    signals = recording.signals(site)
    assert {name: len(signal_NM) for name, signal_NM in signals.items()} == {"value": 64, "output": 64}
    repeated_TN = torch.cat(values).unflatten(1, (4, 1, 8)).expand(-1, -1, 2, -1).flatten(1).numpy()
    column = signals["value"][3 * 16 + 9]
    assert np.isin(column.astype(np.float32), repeated_TN[:, 3 * 16 + 9]).all()
    assert np.array_equal(column, signals["value"][3 * 16 + 1]), "both query heads of the group read the same value"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_groups(
    method: str, heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    settings = {"sequences": 4, "shard_sequences": 2} if method == "taylor" else {}
    config = run(run_config, tmp_path, heads, {"units": ["attention"]}, method={"name": method, **settings})
    folder, plan = carry_out(make_context, config)
    assert {key: len(kept) for key, kept in plan.kept.items()} == {
        f"layer-{layer:03d}.attention": 3 for layer in range(3)
    }
    dense, pruned = (checkpoint.count_parameters(read_config(one)) for one in (heads, folder / "pruned"))
    assert plan.parameters == (dense, pruned)
    config = read_config(folder / "pruned")
    assert (config["num_key_value_heads"], LAYER_KV_HEADS in config) == (3, False) or config[LAYER_KV_HEADS] == [3] * 3


def test_the_repair_makes_up_for_groups(
    heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """The least-squares error of the output map's input over all tokens, against leaving the columns as they are."""
    config = run(run_config, tmp_path, heads, {"units": ["attention"], "ratio": 0.5})
    folder, plan = carry_out(make_context, config)
    site = Site(0, "attention")
    gram_NN = recorded(folder / "round-00").moments(site).gram_NN
    kept_S = np.concatenate([np.arange(16) + 16 * unit for unit in plan.kept[site.key]])
    name = "model.layers.0.self_attn.o_proj.weight"
    with checkpoint.open_tensors(heads) as dense, checkpoint.open_tensors(folder / "pruned") as pruned:
        weight_DN, repaired_DS = dense.read(name).double().numpy(), pruned.read(name).double().numpy()
    errors = []
    for columns_DS in (weight_DN[:, kept_S], repaired_DS):
        change_DN = weight_DN.copy()
        change_DN[:, kept_S] -= columns_DS
        errors.append(float(np.trace(change_DN @ gram_NN @ change_DN.T)))
    assert errors[1] < 0.9 * errors[0]


STACKED = {
    "phi3": {"num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0},
    "gpt_neox": {"num_attention_heads": 4, "num_key_value_heads": None},
}


@pytest.mark.parametrize("model_type", STACKED)
def test_queries_keys_and_values_in_one_map(
    model_type: str, make_model: MakeModel, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """A group whose values are zero does nothing: it is the one that leaves, and nothing changes but for neurons."""
    dense = make_model(tmp_path / "dense", model_type, **STACKED[model_type])
    model, config = checkpoint.load_model(dense, Numerics()), read_config(dense)
    family, site = family_of(config), Site(1, "attention")
    rows = [96 + 8 * 2 + row for row in range(8)] if model_type == "phi3" else [24 * 2 + 16 + row for row in range(8)]
    with torch.no_grad():
        for parameter in model.get_submodule(next(iter(family.modules(site).inputs.values()))).parameters():
            parameter[rows] = 0
    model.save_pretrained(dense)
    mixed = {"units": ["mlp", "attention"], "budget": "parameters", "ratio": 0.15, "allocation": "sensitivity"}
    folder, plan = carry_out(make_context, run(run_config, tmp_path, dense, mixed, method={"name": "wanda"}))
    assert 2 not in plan.kept[site.key], "its signal is zero"
    assert {len(kept) for key, kept in plan.kept.items() if key.endswith("attention")} != {4}
    pruned = load_pruned(folder / "pruned")
    assert plan.parameters[1] == sum(parameter.numel() for parameter in pruned.parameters())
    with torch.inference_mode():
        for key, kept in plan.kept.items():
            solved = pruned.get_submodule(family.modules(Site.from_key(key)).output).weight
            columns = signals_of(kept, family.span(Site.from_key(key), config))
            weight = model.get_submodule(family.modules(Site.from_key(key)).output).weight
            weight[:] = 0
            weight[:, torch.from_numpy(columns)] = solved
        found, expected = (one(input_ids=TOKENS).logits for one in (pruned, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_neurons_and_groups_share_a_budget(
    budget: str, heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    mixed = {"units": ["mlp", "attention"], "budget": budget, "ratio": 0.15}
    folder, plan = carry_out(make_context, run(run_config, tmp_path, heads, mixed))
    widths = {key: len(kept) for key, kept in plan.kept.items()}
    assert {widths[f"layer-{layer:03d}.attention"] for layer in range(3)} == {3}
    assert len({widths[f"layer-{layer:03d}.mlp"] for layer in range(3)}) == 1, "evenly: the same share of each kind"
    if budget == "parameters":
        step = 3 * 4 * 96
        assert 0.15 * plan.parameters[0] <= plan.parameters[0] - plan.parameters[1] < 0.15 * plan.parameters[0] + step
    assert load_pruned(folder / "pruned")(input_ids=TOKENS).logits.isfinite().all()


@pytest.mark.usefixtures("no_fresh_process")
def test_layers_groups_and_neurons_by_measured_losses(
    heads: Path,
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    """A budget so large that a whole layer must go; the compared method gets the same widths."""
    mixed = {"units": ["mlp", "attention", "layer"], "budget": "parameters", "allocation": "sensitivity", "ratio": 0.4}
    config = run(run_config, tmp_path, heads, mixed, compare=[{"name": "random"}], evaluate={"latency_repeats": 0})
    folder, plan = carry_out(make_context, config, "evaluate")
    facts = json.loads((folder / "round-00" / "allocation.json").read_text())
    assert facts["losses"][facts["kept"]] == min(facts["losses"].values())
    assert facts["budget"]["spent"]["sensitivity"] <= facts["budget"]["left"]
    assert plan.parameters[0] - plan.parameters[1] >= 0.4 * plan.parameters[0]
    assert checkpoint.count_parameters(read_config(folder / "pruned")) == plan.parameters[1]
    chosen = facts["widths"]["sensitivity"]
    gone = [layer for layer in range(3) if not chosen[f"layer-{layer:03d}.block"]]
    assert all(chosen[f"layer-{layer:03d}.{part}"] == 0 for layer in gone for part in ("mlp", "attention"))
    losses = json.loads((folder / "report.json").read_text())
    assert {one["label"] for one in losses["comparison"]} >= {"random"}


def test_schedules_and_a_resumed_run_record_the_same(
    heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """Layer by layer or whole, and with a site lost in between: the same bytes for neurons and groups."""
    found = []
    for schedule in ("replicate", "sweep"):
        record = {"tokens": 128, "schedule": schedule}
        mixed = {"units": ["mlp", "attention"], "budget": "parameters", "ratio": 0.15}
        config = run(run_config, tmp_path / schedule, heads, mixed, record=record)
        folder, _ = carry_out(make_context, config, "record")
        found.append((folder / "round-00" / "manifest.json").read_bytes())
        if schedule == "replicate":
            (folder / "round-00" / "manifest.json").unlink()
            for lost in (folder / "round-00" / "commits" / "layer-001.attention").iterdir():
                lost.unlink()
            carry_out(make_context, config, "record")
            found.append((folder / "round-00" / "manifest.json").read_bytes())
    assert found[0] == found[1] == found[2]


REFUSED = [
    ({"units": []}, "must name mlp, attention or both"),
    ({"units": ["mlp", "mlp"]}, "must name mlp, attention or both"),
    ({"units": ["layer"]}, "must name mlp, attention or both"),
    ({"units": ["mlp", "layer"], "budget": "macs"}, "set prune.allocation=sensitivity"),
    ({"units": ["mlp", "attention"]}, "set prune.budget=parameters or macs"),
    ({"budget": "kv_cache"}, "budget=kv_cache is spent on attention"),
    ({"budget": "latency", "allocation": "global"}, "budget=latency weighs measured times against measured losses"),
    ({"units": ["attention"], "repair": "bias"}, "set prune.repair=least_squares"),
    ({"units": ["attention"], "ratio": 0.8}, "leaves 0 of 4 units"),
    ({"units": ["attention"], "ratio": 0.5, "budget": "parameters"}, "more than the prunable units hold"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_units_that_cannot_be_removed_so(
    settings: dict[str, Any], message: str, heads: Path, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, CriaError), match=message):
        prepare(run(run_config, tmp_path, heads, settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "eigenvalue"}}, "does not know prune.units"),
        ({"compare": [{"name": "block_influence"}]}, "does not know prune.units"),
        ({"record": {"tokens": 64, "schedule": "tensor"}}, "set record.schedule=auto"),
    ],
)
def test_what_does_not_go_with_groups(
    changes: dict[str, Any], message: str, heads: Path, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(run(run_config, tmp_path, heads, {"units": ["attention"]}, **changes))


@pytest.mark.parametrize(
    ("model_type", "own", "reason"),
    [
        (
            "cohere",
            {"use_qk_norm": True},
            r"attention cannot \(self_attn must be q_proj, k_proj, v_proj and o_proj alone",
        ),
    ],
)
def test_heads_that_cannot_leave(
    model_type: str,
    own: dict[str, Any],
    reason: str,
    make_model: MakeModel,
    run_config: RunConfigMaker,
    tmp_path: Path,
) -> None:
    dense = make_model(tmp_path / "dense", model_type, **own)
    with pytest.raises(ConfigError, match=reason):
        prepare(run(run_config, tmp_path, dense, {"units": ["attention"]}))


def test_a_kv_cache_budget(heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    settings = {"units": ["attention"], "budget": "kv_cache", "ratio": 0.5, "allocation": "global", "floor": 0.0}
    _, plan = carry_out(make_context, run(run_config, tmp_path, heads, settings), "decide")
    assert sum(len(kept) for kept in plan.kept.values()) == 6
