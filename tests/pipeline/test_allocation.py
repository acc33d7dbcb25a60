"""Runs whose budget is spread over the layers: from scores or losses to a checkpoint that loads."""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cria_dist import load_pruned, pipeline
from cria_dist.config import RunConfig
from cria_dist.files import read_json
from cria_dist.methods import Magnitude
from cria_dist.models import checkpoint, surgery
from cria_dist.models.family import family_of
from cria_dist.pipeline import Context, allocation, prune
from cria_dist.pool import Flow, LocalPool
from cria_dist.records import PruningPlan, Report, Stage
from cria_dist.stages import verify
from cria_dist.stages.answers import answer_of

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

KEYS = ("layer-000.mlp", "layer-001.mlp")
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
SPREAD: dict[str, Any] = {"ratio": 0.25, "multiple": 4}
METHOD = {"name": "magnitude"}


class Dealing(LocalPool):
    """Deals the items from the last to the first to several workers in turn, and notes whose items they were."""

    def __init__(self, workers: int = 1, die_at: str = "") -> None:
        self.workers = workers
        self.done: list[str] = []
        self._die_at = die_at

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        workers: int | None = None,
        flow: Flow[Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        del workers, flow
        assert isinstance(make_worker, functools.partial)
        hands = [make_worker() for _ in range(min(self.workers, len(items)))]
        for turn, item in enumerate(reversed(items) if self.workers > 1 else items):
            if str(item) == self._die_at:
                raise KeyboardInterrupt
            self.done.append(str(item))
            yield item, hands[turn % len(hands)](item)


def carry_out(
    make_context: MakeContext, config: RunConfig, until: Stage = "apply", pool: Dealing | None = None
) -> tuple[Path, Dealing]:
    pool = pool or Dealing()
    context = make_context(config, pool, until)
    prune(context, until=until)
    return context.job.folder, pool


def plan_of(folder: Path) -> PruningPlan:
    return PruningPlan.from_json((folder / "plan.json").read_text())


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "round-00" / allocation.FACTS).read_text())


def widths_of(plan: PruningPlan) -> dict[str, int]:
    return {key: len(kept) for key, kept in plan.kept.items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of spreading come to 24 and 48 units, and the held-out text is happy with it."""
    for name in ("global_widths", "sensitivity_widths"):
        monkeypatch.setattr(allocation, name, lambda *_: {KEYS[0]: 24, KEYS[1]: 48})
    real = allocation._losses
    monkeypatch.setattr(
        allocation,
        "_losses",
        lambda *given: {name: loss + (name == "uniform") for name, loss in real(*given).items()},
    )


@pytest.mark.usefixtures("uneven")
@pytest.mark.parametrize("chosen_by", ["global", "sensitivity"])
@pytest.mark.parametrize("repair", ["none", "least_squares"])
def test_removing_equals_masking(
    chosen_by: str, repair: str, run_config: RunConfigMaker, make_context: MakeContext, pico: Path, tmp_path: Path
) -> None:
    config = run_config(tmp_path, method=METHOD, prune={**SPREAD, "allocation": chosen_by, "repair": repair})
    folder, _ = carry_out(make_context, config)
    plan = plan_of(folder / "pruned")
    assert widths_of(plan) == {KEYS[0]: 24, KEYS[1]: 48}
    masked = checkpoint.load_model(pico, checkpoint.Numerics())
    for layer, block in enumerate(masked.model.layers):
        kept = list(plan.kept[KEYS[layer]])
        columns = block.mlp.down_proj.weight.detach().clone()[:, kept]
        if repair == "least_squares":
            with checkpoint.open_tensors(folder / "pruned") as tensors:
                columns = tensors.read(f"model.layers.{layer}.mlp.down_proj.weight")
        with torch.no_grad():
            block.mlp.down_proj.weight.zero_()
            block.mlp.down_proj.weight[:, kept] = columns
    pruned = load_pruned(folder / "pruned")
    assert torch.allclose(logits(pruned), logits(masked), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in pruned.parameters()) == plan.parameters[1]


@pytest.mark.parametrize("chosen_by", ["global", "sensitivity"])
@pytest.mark.parametrize("measure", ["units", "parameters", "macs"])
def test_the_budget_is_hit_within_one_multiple(
    chosen_by: str, measure: str, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    changes = {"ratio": 0.13, "multiple": 2, "allocation": chosen_by, "budget": measure}
    folder, _ = carry_out(make_context, run_config(tmp_path, method=METHOD, prune=changes), "decide")
    facts, plan = facts_of(folder), plan_of(folder / "round-00")
    budget = facts["budget"]
    step = 2 * (1 if measure == "units" else 96)
    assert budget["left"] - step < budget["spent"][chosen_by] <= budget["left"]
    assert budget["measure"] == measure
    assert widths_of(plan) == facts["widths"][facts["kept"]]
    if measure == "parameters":
        assert 0.13 <= plan.ratio < 0.13 + step / plan.parameters[0] + (facts["kept"] == "uniform")


def test_a_worse_allocation_is_not_kept(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run says so, and goes on as if nothing else had been asked for."""
    even = carry_out(make_context, run_config(tmp_path, method=METHOD, prune=SPREAD))[0]
    real = allocation._losses
    monkeypatch.setattr(
        allocation, "_losses", lambda *given: {name: loss + (name == "global") for name, loss in real(*given).items()}
    )
    config = run_config(tmp_path, method=METHOD, prune={**SPREAD, "allocation": "global"})
    folder, _ = carry_out(make_context, config)
    facts = facts_of(folder)
    assert facts["kept"] == "uniform"
    assert facts["losses"]["uniform"] < facts["losses"]["global"]
    assert facts["held_out_tokens"] == 4 * 31
    assert widths_of(plan_of(folder / "pruned")) == {KEYS[0]: 36, KEYS[1]: 36}
    assert "intermediate_size_per_layer" not in checkpoint.read_config(folder / "pruned")
    weights = [one / "pruned" / checkpoint.WEIGHTS for one in (even, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "uniform widths kept; loss on 124 held-out calibration tokens: uniform" in (folder / "log.jsonl").read_text()


@pytest.mark.parametrize("chosen_by", ["global", "sensitivity"])
def test_any_number_of_workers_and_a_resumed_run_give_the_same(
    chosen_by: str, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    changes = {**SPREAD, "allocation": chosen_by}
    last = "loss of the uniform widths"
    one, first = carry_out(make_context, run_config(tmp_path / "one", method=METHOD, prune=changes))
    two, _ = carry_out(make_context, run_config(tmp_path / "two", method=METHOD, prune=changes), pool=Dealing(2))
    cut = run_config(tmp_path / "cut", method=METHOD, prune=changes)
    with pytest.raises(KeyboardInterrupt):
        carry_out(make_context, cut, pool=Dealing(die_at=last))
    resumed, rest = carry_out(make_context, cut)
    for folder in (two, resumed):
        for name in (
            "round-00/plan.json",
            "round-00/allocation.json",
            "pruned/model.safetensors",
            "pruned/config.json",
        ):
            assert (folder / name).read_bytes() == (one / name).read_bytes(), name
    measured = [item for item in first.done if item.startswith("loss")]
    assert measured.count(last) == 1
    left = [item for item in rest.done if item.startswith("loss")]
    assert left == measured[measured.index(last) :]
    _, again = carry_out(make_context, cut)
    assert not again.done


def test_another_ratio_takes_over_the_curves(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """They are measured at the same widths whatever the ratio."""
    for ratio, curves in ((0.25, 2), (0.4, 0)):
        changes = {**SPREAD, "allocation": "sensitivity", "ratio": ratio}
        _, pool = carry_out(make_context, run_config(tmp_path, method=METHOD, prune=changes), "decide")
        assert sum(item.startswith("loss without") for item in pool.done) == curves


def test_curves_are_measured_on_few_tokens_and_allocations_on_all(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses_of(name: str) -> dict[str, Any]:
        config = run_config(tmp_path / name, method=METHOD, prune={**SPREAD, "allocation": "sensitivity"})
        folder, _ = carry_out(make_context, config, "decide")
        measured = {path.stem: read_json(path)["losses"] for path in (folder / "round-00/sensitivity").glob("*.json")}
        return measured | {"tokens": facts_of(folder)["held_out_tokens"]}

    many = losses_of("many")
    monkeypatch.setattr(allocation, "CURVE_TOKENS", 1)  # one sequence
    few = losses_of("few")
    assert few["tokens"] == many["tokens"]
    assert few["uniform"] == many["uniform"]
    assert few["dense"] != many["dense"]
    assert all(few[key] != many[key] and len(few[key]) == len(many[key]) for key in KEYS)


def test_protected_layers_and_floors(run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    changes = {**SPREAD, "ratio": 0.25, "allocation": "sensitivity", "protect": [-1]}
    folder, pool = carry_out(make_context, run_config(tmp_path, method=METHOD, prune=changes))
    assert widths_of(plan_of(folder / "pruned")) == {KEYS[0]: 24, KEYS[1]: 48}
    assert facts_of(folder)["widths"]["uniform"] == {KEYS[0]: 24, KEYS[1]: 48}
    assert "loss without units of layer-001.mlp" not in pool.done
    floor = {**SPREAD, "ratio": 0.3, "allocation": "global", "floor": 0.6}
    folder, _ = carry_out(make_context, run_config(tmp_path, method=METHOD, prune=floor))
    assert min(facts_of(folder)["widths"]["global"].values()) >= 0.6 * 48


@pytest.mark.usefixtures("uneven")
def test_rounds_go_on_from_uneven_layers(run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    """The second round records, scores and prunes the 24 and 48 units that the first left."""
    config = run_config(tmp_path, method=METHOD, prune={**SPREAD, "ratio": 0.5, "allocation": "global", "rounds": 2})
    context = make_context(config)
    with pytest.MonkeyPatch.context() as patch:
        steps = iter([{KEYS[0]: 24, KEYS[1]: 48}, {KEYS[0]: 16, KEYS[1]: 32}])
        patch.setattr(allocation, "global_widths", lambda *_: next(steps))
        prune(context, until="apply")
    folder = context.job.folder
    assert checkpoint.read_config(folder / "round-00" / "pruned")["intermediate_size_per_layer"] == [24, 48]
    first, last = plan_of(folder / "round-00"), plan_of(folder / "pruned")
    assert widths_of(last) == {KEYS[0]: 16, KEYS[1]: 32}
    assert all(set(last.kept[key]) < set(first.kept[key]) for key in KEYS)
    model = load_pruned(folder / "pruned")
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [16, 32]


def test_two_rounds_of_scores_keep_the_budget(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, method=METHOD, prune={**SPREAD, "ratio": 0.5, "allocation": "global", "rounds": 2})
    folder, _ = carry_out(make_context, config)
    assert 40 <= sum(widths_of(plan_of(folder / "pruned")).values()) <= 48
    assert (folder / "round-01" / allocation.FACTS).is_file()


def test_rounds_go_on_where_an_even_share_would_leave_no_group(
    make_model: Callable[..., Path],
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two fifths of the 2 and 3 groups that the first round left: what is compared keeps one of each."""
    model = make_model(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    keys = [f"layer-{layer:03d}.attention" for layer in (0, 1)]
    steps = iter([dict(zip(keys, (2, 3), strict=True)), dict.fromkeys(keys, 1)])
    monkeypatch.setattr(allocation, "global_widths", lambda *_: next(steps))
    real = allocation._losses
    monkeypatch.setattr(
        allocation,
        "_losses",
        lambda *given: {name: loss + (name == "uniform") for name, loss in real(*given).items()},
    )
    changes = {"units": ["attention"], "ratio": 0.75, "rounds": 2, "allocation": "global"}
    config = run_config(tmp_path, model={"path": str(model)}, method=METHOD, prune=changes)
    folder, _ = carry_out(make_context, config)
    facts = read_json(folder / "round-01" / allocation.FACTS)
    assert facts["widths"]["uniform"] == widths_of(plan_of(folder / "pruned")) == dict.fromkeys(keys, 1)


@pytest.mark.parametrize("comparable", [False, True])
def test_the_method_says_whether_scores_are_ranked_as_they_are(
    comparable: bool,
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[bool] = []
    real = allocation.global_widths

    def spy(*args: Any) -> dict[str, int]:
        given.append(args[3])
        return real(*args)

    monkeypatch.setattr(allocation, "global_widths", spy)
    monkeypatch.setattr(Magnitude, "comparable", comparable)
    carry_out(make_context, run_config(tmp_path, method=METHOD, prune={**SPREAD, "allocation": "global"}), "decide")
    assert given == [comparable]


@pytest.mark.usefixtures("uneven")
@pytest.mark.usefixtures("no_fresh_process")
def test_the_whole_story_with_uneven_layers(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery, evaluation and example texts; compared methods get the same widths."""
    reports: list[Report] = []
    monkeypatch.setattr(pipeline, "write_report", lambda report, *_: reports.append(report))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # waiting for all threads of a busy machine takes seconds
    config = run_config(
        tmp_path,
        method=METHOD,
        prune={**SPREAD, "allocation": "sensitivity"},
        compare=[{"name": "random"}],
        recover={"steps": 2},
        evaluate={"latency_repeats": 0},
    )
    folder, _ = carry_out(make_context, config, "evaluate")
    [report] = reports
    parameters = {one.label: one.parameters for one in report.variants}
    assert parameters["recovered"] == parameters["repaired"] == plan_of(folder / "pruned").parameters[1]
    assert all(np.isfinite(one.perplexity) for one in (*report.variants, *report.comparison))
    assert widths_of(plan_of(folder / "comparison" / "00-random")) == {KEYS[0]: 24, KEYS[1]: 48}
    assert {one.parameters for one in report.comparison} == {parameters["repaired"]}
    assert checkpoint.read_config(folder / "recovered")["intermediate_size_per_layer"] == [24, 48]


def test_a_fresh_process_loads_uneven_layers(pico: Path, tmp_path: Path) -> None:
    config = checkpoint.read_config(pico)
    kept = {KEYS[0]: tuple(range(20)), KEYS[1]: tuple(range(30))}
    done = surgery.Surgery(family_of(config), config, kept)
    surgery.write_pruned(pico, tmp_path / "pruned", done)
    np.save(tmp_path / "tokens.npy", TOKENS.numpy().astype(np.int32))
    reference = surgery.pruned_copy(checkpoint.load_model(pico, checkpoint.Numerics()), done)
    found = verify.loads_in_transformers(tmp_path / "pruned", answer_of(reference, tmp_path / "tokens.npy"))
    assert found.startswith(
        "the layers differ in width, which stock from_pretrained refuses; loaded in a fresh process"
    )
    assert "by cria_dist.load_pruned, logits equal (largest difference" in found


def test_a_real_model(
    stories: Path,
    make_context: MakeContext,
    run_config: RunConfigMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is kept is never worse than even widths on the held-out text, and a bad allocation is found out."""
    text = (stories / "TinyStories-valid-30k.txt").read_text()
    parts = {name: tmp_path / f"{name}.txt" for name in ("calibration", "test")}
    for path, half in zip(parts.values(), (text[: len(text) // 2], text[len(text) // 2 :]), strict=True):
        path.write_text(half)
    data = {name: {"source": str(path), "part": "all"} for name, path in parts.items()}
    bad = {f"layer-{layer:03d}.mlp": width for layer, width in enumerate((44, 43, 172, 172, 171))}
    found: dict[str, str] = {}
    for chosen_by in ("sensitivity", "global"):
        if chosen_by == "global":
            monkeypatch.setattr(allocation, "global_widths", lambda *_: bad)
        config = run_config(
            tmp_path,
            model={"path": str(stories)},
            data={**data, "sequence_length": 64, "calibration_sequences": 32, "test_sequences": 8},
            record={"tokens": 800, "shard_sequences": 8},
            method=METHOD,
            prune={"ratio": 0.3, "multiple": 1, "allocation": chosen_by},
        )
        folder, _ = carry_out(make_context, config)
        facts, widths = facts_of(folder), widths_of(plan_of(folder / "pruned"))
        assert facts["losses"][facts["kept"]] == min(facts["losses"].values())
        assert sum(widths.values()) == (600 if facts["kept"] == "uniform" else 602)  # 0.7 x 172 = 120.4
        sizes = [layer.mlp.up_proj.out_features for layer in load_pruned(folder / "pruned").model.layers]
        assert sizes == list(widths.values())
        found[chosen_by] = facts["kept"]
    assert found["global"] == "uniform"
