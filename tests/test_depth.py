"""Runs that remove whole layers, end to end in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, PlanError
from cria_dist.models import checkpoint, surgery
from cria_dist.models.family import family_of
from cria_dist.models.sizes import sizes_of
from cria_dist.pipeline import Context, prune
from cria_dist.records import PruningPlan, Site
from cria_dist.report.writer import report_from_json
from cria_dist.stages.decide_depth import fewest_layers, layers_to_remove
from cria_dist.stages.evaluate import mean_loss
from cria_dist.store.places import recorded

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]
MakeModel = Callable[..., Path]
BI = {"name": "block_influence"}


@pytest.fixture(scope="session")
def deep(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 6 layers; not to be written to."""
    return make_model(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=6)


def plan_of(folder: Path) -> PruningPlan:
    return PruningPlan.from_json((folder / "plan.json").read_text())


def removed(plan: PruningPlan) -> list[int]:
    return [Site.from_key(key).layer for key in sorted(plan.kept) if not plan.kept[key]]


@pytest.mark.slow
@pytest.mark.soak
def test_a_whole_run_with_block_influence(
    deep: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    changes = {"ratio": 0.3, "multiple": 4}
    compare = [{"name": "random"}, BI]
    config = run_config(tmp_path, model={"path": str(deep)}, method=BI, prune=changes, compare=compare)
    context = make_context(config)
    prune(context, "python -m pytest")
    context.progress.close("done")
    folder = context.job.folder
    plan, report = plan_of(folder / "pruned"), report_from_json(folder / "report.json")
    assert [one.label for one in report.variants] == ["dense", "pruned", "recovered"]  # nothing to repair
    assert [(one.label, one.repair) for one in report.comparison] == [
        ("random", "none"),
        ("random", "least_squares"),
        ("block_influence", "none"),
    ]
    assert len(removed(plan)) == 2  # the fewest that are 30 % of 6
    assert report.comparison[-1].perplexity == report.variants[1].perplexity
    model = checkpoint.load_model(folder / "pruned", checkpoint.Numerics())
    assert plan.parameters[1] == sum(parameter.numel() for parameter in model.parameters())
    assert report.variants[1].parameters == plan.parameters[1]
    assert plan.ratio == (plan.parameters[0] - plan.parameters[1]) / plan.parameters[0]
    found = {name: finding for name, finding in report.loaders.items() if name.startswith("transformers")}
    assert found
    assert all("logits equal" in finding for finding in found.values())
    assert (folder / "report.html").is_file()
    assert not (folder / "round-00" / "repair").exists()


def test_the_layers_that_turn_least_go(
    deep: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, model={"path": str(deep)}, method=BI, prune={"ratio": 0.5})
    context = make_context(config, until="decide")
    prune(context, until="decide")
    recording = recorded(context.job.folder / "round-00")
    influence = []
    before = recording.signals(Site(0, "block"))["input"].astype(np.float64)
    for layer in range(6):
        after = recording.signals(Site(layer, "block"))["output"].astype(np.float64)
        cosine = (before * after).sum(0) / np.linalg.norm(before, axis=0) / np.linalg.norm(after, axis=0)
        influence.append(1 - cosine.mean())
        before = after
    assert removed(plan_of(context.job.folder / "round-00")) == sorted(np.argsort(influence)[:3].tolist())


def test_rounds_compose_to_the_numbering_of_the_dense_model(
    deep: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    prune_settings = {"ratio": 0.5, "rounds": 3}
    config = run_config(tmp_path, model={"path": str(deep)}, method=BI, prune=prune_settings)
    context = make_context(config, until="apply")
    prune(context, until="apply")
    plans = [removed(plan_of(context.job.folder / f"round-{index:02d}")) for index in range(3)]
    assert [len(one) for one in plans] == [1, 2, 3]
    assert set(plans[0]) < set(plans[1]) < set(plans[2])
    pruned = checkpoint.read_config(context.job.folder / "pruned")
    assert pruned["num_hidden_layers"] == 3
    kept = [layer for layer in range(6) if layer not in plans[2]]
    name = "model.layers.{}.mlp.down_proj.weight"
    with checkpoint.open_tensors(deep) as old, checkpoint.open_tensors(context.job.folder / "pruned") as new:
        for number, layer in enumerate(kept):
            assert old.read(name.format(layer)).equal(new.read(name.format(number)))


def test_a_run_is_resumed_without_work(
    deep: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, model={"path": str(deep)}, method=BI, prune={"ratio": 0.3})
    first = make_context(config, until="apply")
    prune(first, until="apply")
    before = {path: path.read_bytes() for path in first.job.folder.rglob("*.npz")}
    again = make_context(config, until="apply")
    prune(again, until="apply")
    assert {path: path.read_bytes() for path in first.job.folder.rglob("*.npz")} == before
    stages = {time.stage for time in first.stage_times()}
    assert stages == {"record", "analyse", "apply"}
    books = json.loads((first.job.folder / "timings.json").read_text())
    assert dict(books) == {time.stage: time.seconds for time in again.stage_times()}


def test_the_fewest_layers_that_reach_the_budget(deep: Path, run_config: RunConfigMaker, tmp_path: Path) -> None:
    model_config = checkpoint.read_config(deep)
    family, dense = family_of(model_config), checkpoint.count_parameters(model_config)

    def layers(ratio: float, budget: str) -> int:
        settings = {"ratio": ratio, "budget": budget}
        config = run_config(tmp_path, model={"path": str(deep)}, method=BI, prune=settings)
        return layers_to_remove(config, family, model_config, dense)

    assert [layers(ratio, "units") for ratio in (0.01, 1 / 6, 0.34, 0.5, 5 / 6)] == [1, 1, 3, 3, 5]
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    for count in (1, 2, 3):
        assert layers(count * layer / dense, "parameters") == count
        assert layers(count * layer / dense + 1e-6, "parameters") == count + 1
    macs = layer - 2 * 32 + 2 * 32 * 32  # linear maps and attention over 32 positions; norms do not count
    assert layers(2 * macs / (6 * macs + 300 * 32), "macs") == 2
    assert layers(2 * macs / (6 * macs + 300 * 32) + 1e-6, "macs") == 3


def test_layers_go_until_their_own_sizes_make_up_the_budget() -> None:
    sizes = [9, 9, 1, 9]

    def order(count: int) -> tuple[int, ...]:
        return (1, 2, 3, 0)[:count]

    assert [fewest_layers(order, sizes, wanted) for wanted in (0, 9, 9.5, 11)] == [(), (1,), (1, 2), (1, 2, 3)]
    assert fewest_layers(lambda count: (2,), sizes, 5) == (2,), "a method that spares no more"


@pytest.mark.parametrize("method", ["block_influence", "mpruner"])
def test_a_small_layer_makes_no_others_go(
    method: str, make_model: MakeModel, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """Of 6 layers the last has next to no neurons; what goes is the ratio, and no layer more than it takes."""
    dense = make_model(tmp_path / "dense", num_hidden_layers=6)
    config = checkpoint.read_config(dense)
    family = family_of(config)
    kept = {f"layer-{layer:03d}.mlp": tuple(range(48 if layer < 5 else 4)) for layer in range(6)}
    surgery.write_pruned(dense, tmp_path / "model", surgery.Surgery(family, config, kept))
    found = {}
    for ratio, rounds in ((0.2, 1), (0.4, 1), (0.4, 2), (0.6, 1)):
        changes = {"ratio": ratio, "rounds": rounds, "budget": "parameters"}
        settings = {"model": {"path": str(tmp_path / "model")}, "method": {"name": method}}
        context = make_context(run_config(tmp_path, **settings, prune=changes), until="apply")
        prune(context, until="apply")
        plan = found[ratio] = plan_of(context.job.folder / "pruned")
        largest = max(sizes_of(checkpoint.read_config(tmp_path / "model"), family).layers) / plan.parameters[0]
        assert ratio <= plan.ratio < ratio + largest
    assert len(removed(found[0.2])) < len(removed(found[0.4])) < len(removed(found[0.6]))
    assert removed(found[0.6]) != list(range(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prune": {"ratio": 0.9}},
            r"of the 6 layers is more than .* \(0\.833\), and one must stay; lower prune\.ratio",
        ),
        ({"prune": {"ratio": 0.9, "budget": "parameters"}}, r"parameters is more than all layers but the largest hold"),
        ({"record": {"schedule": "tensor"}}, "block_influence reads hidden states.*tensor"),
        ({"method": {"name": "mpruner"}, "record": {"tokens": 47}}, r"mpruner needs 4 sampled .* raise it to 48"),
        ({"method": {"name": "mpruner", "stop": "loss", "held_out": 0.01}}, "leaves 12 to measure on and 0 to judge"),
        (
            {"compare": [{"name": "mpruner", "stop": "loss"}]},
            "mpruner, perplexity x 1.2 decides by itself.*stop=budget",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    changes: dict[str, Any], message: str, deep: Path, run_config: RunConfigMaker, make_context: Any, tmp_path: Path
) -> None:
    config = run_config(tmp_path, **{"model": {"path": str(deep)}, "method": BI, **changes})
    with pytest.raises((ConfigError, PlanError), match=message):
        make_context(config)
    assert not (tmp_path / "runs").exists()


def test_a_model_with_one_layer_has_none_to_spare(
    make_model: Callable[..., Path], run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    config = run_config(tmp_path, model={"path": str(shallow)}, compare=[BI])
    with pytest.raises(ConfigError, match="block_influence removes whole layers and the model has one"):
        make_context(config)


# mpruner


def test_mpruner_removes_what_the_budget_asks_for(
    deep: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """Nothing is alike in a random model, so ``tau`` is lowered."""
    found = []
    for ratio in (0.2, 0.5, 0.8):
        config = run_config(tmp_path, model={"path": str(deep)}, method={"name": "mpruner"}, prune={"ratio": ratio})
        context = make_context(config, until="decide")
        prune(context, until="decide")
        found.append(removed(plan_of(context.job.folder / "round-00")))
    assert [len(one) for one in found] == [2, 3, 5]
    assert all(0 not in one for one in found)


@pytest.fixture(scope="session")
def alike(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 6 layers of which 1, 2, 4 and 5 do next to nothing; not to be written to."""
    folder = make_model(tmp_path_factory.mktemp("models") / "alike", num_hidden_layers=6)
    tensors = load_file(folder / checkpoint.WEIGHTS)
    for layer in (1, 2, 4, 5):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"] *= 1e-3
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    return folder


def loop(alike: Path, run_config: RunConfigMaker, tmp_path: Path, ratio: float, **method: Any) -> RunConfig:
    settings = {"name": "mpruner", "stop": "loss", "tau": 0.99, **method}
    return run_config(tmp_path, model={"path": str(alike)}, method=settings, prune={"ratio": ratio, "rounds": 4})


def test_the_loop_ends_where_every_layer_is_its_own_cluster(
    alike: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context(loop(alike, run_config, tmp_path, 0.8), until="apply")
    prune(context, until="apply")
    folder = context.job.folder
    assert removed(plan_of(folder / "pruned")) == [1, 2, 4, 5]
    assert sorted(path.name for path in folder.glob("round-*")) == ["round-00", "round-01"]  # of 4: nothing was left
    first, second = (json.loads((folder / name / "trials.json").read_text()) for name in ("round-00", "round-01"))
    assert first["accepted"] == 0
    assert abs(first["rises"]["0"]) < 0.01
    assert second == {"accepted": None, "rises": {}, "tolerance": 0.2}
    assert checkpoint.read_config(folder / "pruned")["num_hidden_layers"] == 2


def test_the_budget_caps_the_loop(
    alike: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context(loop(alike, run_config, tmp_path, 0.5), until="apply")
    prune(context, until="apply")
    gone = removed(plan_of(context.job.folder / "pruned"))
    assert len(gone) == 3
    assert set(gone) < {1, 2, 4, 5}


def test_what_costs_too_much_is_put_back(
    deep: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """At a low ``tau`` all layers of a random model are one cluster; its granularities cost less and less."""
    rises = {}
    for threshold in (1e-9, 0.2):
        settings = {"tau": 0.05, "threshold": threshold}
        context = make_context(loop(deep, run_config, tmp_path, 0.8, **settings), until="apply")
        prune(context, until="apply")
        folder = context.job.folder
        trials = json.loads((folder / "round-00" / "trials.json").read_text())
        rises[threshold] = trials["rises"]
        within = [int(number) for number, rise in trials["rises"].items() if rise <= threshold]
        assert trials["accepted"] == (min(within) if within else None)
        expected = {0: 5, 1: 3, 2: 2, None: 0}[trials["accepted"]]
        assert len(removed(plan_of(folder / "round-00"))) == expected
        assert checkpoint.is_complete(folder / "pruned")
    assert rises[1e-9] == rises[0.2]
    assert len(set(rises[0.2].values())) == 3


def test_the_granularity_is_kept_from_round_to_round(
    deep: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """What was rejected in one round is not tried again in the next, on the smaller model."""
    context = make_context(loop(deep, run_config, tmp_path, 0.8, tau=0.05, threshold=0.1), until="apply")
    prune(context, until="apply")
    folder = context.job.folder
    first, second = (json.loads((folder / f"round-{index:02d}" / "trials.json").read_text()) for index in (0, 1))
    assert first["rises"]["0"] > 0.1 >= first["rises"]["1"], first
    assert first["accepted"] == 1
    assert "0" not in second["rises"]
    assert "1" in second["rises"]


@pytest.mark.parametrize("method", ["block_influence", "mpruner"])
def test_a_real_model_loses_its_most_dispensable_layer(
    method: str, stories: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """Of 5 layers one goes: not the first, and its absence costs less than that of most others."""
    text = {"source": str(stories / "TinyStories-valid-30k.txt"), "part": "all"}
    data = {"calibration": text, "test": text, "sequence_length": 64, "max_overlap": 1.0}
    settings: dict[str, Any] = {"model": {"path": str(stories)}, "data": data, "method": {"name": method}}
    context = make_context(run_config(tmp_path, **settings, prune={"ratio": 0.2}), until="decide")
    prune(context, until="decide")
    (gone,) = removed(plan_of(context.job.folder / "round-00"))
    model, tokens_ST = checkpoint.load_model(stories, checkpoint.Numerics()), np.load(context.job.test_path)
    losses = []
    for layer in model.model.layers:
        forward, layer.forward = layer.forward, lambda hidden_states, *_args, **_kwargs: hidden_states
        losses.append(mean_loss(model, tokens_ST, 4))
        layer.forward = forward
    assert gone != 0
    assert sorted(losses).index(losses[gone]) <= 2, losses
