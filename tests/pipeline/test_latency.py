"""Runs whose budget is time, with a clock that knows what every unit takes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from cria_dist.config import RunConfig
from cria_dist.errors import PlanError
from cria_dist.maths.allocation_rooms import SLOPE
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned
from cria_dist.pipeline import Context, latency, prune
from cria_dist.records import PruningPlan, Site
from cria_dist.report.progress import Progress
from cria_dist.runtime import sweep as sweeps
from cria_dist.runtime import trials
from cria_dist.stages.layer_times import LayerTimer
from cria_dist.stages.sweep import Sweep
from cria_dist.stages.trial import Trial

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]
TAKES = {"block": 2.0, "attention": 3.0, "mlp": 0.25}
OUTSIDE = 5.0


def clock(model: PreTrainedModel) -> float:
    heads = model.config.head_dim
    return OUTSIDE + sum(
        TAKES["block"]
        + TAKES["attention"] * layer.self_attn.k_proj.out_features / heads
        + TAKES["mlp"] * layer.mlp.up_proj.out_features
        for layer in model.base_model.layers
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []

    def ratio(self: LayerTimer, whole: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
        counted.append(1)
        return clock(whole), clock(other)

    monkeypatch.setattr(LayerTimer, "_ratio", ratio)
    return counted


def plan_of(
    make_context: MakeContext,
    run_config: RunConfigMaker,
    folder: Path,
    model: Path,
    ratio: float,
    units: tuple[str, ...] = ("mlp", "attention", "layer"),
) -> PruningPlan:
    settings = {"units": list(units), "allocation": "sensitivity", "budget": "latency"}
    changes = {
        "record": {"shard_sequences": 2},
        "model": {"path": str(model)},
        "method": {"name": "wanda"},
        "compare": [],
    }
    config = run_config(folder, **changes, prune={**settings, "ratio": ratio, "multiple": 4})
    context = make_context(config, until="apply")
    prune(context, until="apply")
    return PruningPlan.from_json((context.job.folder / "round-00" / "plan.json").read_text())


@pytest.fixture(scope="module")
def heads(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "model"
    return make_model(folder, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def test_the_plan_takes_the_share_of_the_time_that_was_asked_for(
    measured: list[int], heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    dense = OUTSIDE + 3 * (TAKES["block"] + 2 * TAKES["attention"] + 48 * TAKES["mlp"])
    for ratio in (0.2, 0.4):
        plan = plan_of(make_context, run_config, tmp_path, heads, ratio)
        left = OUTSIDE + sum(len(kept) * TAKES[Site.from_key(key).part] for key, kept in plan.kept.items())
        assert left <= (1 - ratio) * dense * 1.001
        assert left > (1 - ratio) * dense - TAKES["attention"]  # no more went than the coarsest step
    first = len(measured)
    assert first > 0
    assert len(list(tmp_path.rglob("latency-*.json"))) == 2  # the second run took the table over
    plan_of(make_context, run_config, tmp_path, heads, 0.2)
    assert len(measured) == first
    facts = json.loads(next(tmp_path.rglob("allocation.json")).read_text())
    assert facts["budget"]["measure"] == "latency"


@pytest.mark.parametrize("units", [("mlp",), ("mlp", "layer"), ("mlp", "attention", "layer")])
def test_layers_that_differ_take_the_time_of_their_own_widths(
    units: tuple[str, ...],
    measured: list[int],
    heads: Path,
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    """The first layer is the narrowest; groups of the second are fewer, whether or not the run removes any."""
    there = {Site(0): 24, Site(1): 48, Site(2): 40}
    there |= {Site(layer, "attention"): groups for layer, groups in enumerate((2, 1, 2))}
    config = checkpoint.read_config(heads)
    kept = {site.key: tuple(range(width)) for site, width in there.items()}
    write_pruned(heads, tmp_path / "uneven", Surgery(family_of(config), config, kept))
    settings = {"units": list(units), "allocation": "sensitivity", "budget": "latency"}
    uneven = run_config(
        tmp_path,
        model={"path": str(tmp_path / "uneven")},
        method={"name": "wanda"},
        record={"shard_sequences": 2},
        prune=settings,
    )
    budget = latency.budget(make_context(uneven, until="apply"))
    dense = OUTSIDE + 3 * TAKES["block"] + sum(TAKES[site.part] * width for site, width in there.items())
    assert budget.total == pytest.approx(dense, rel=2 * SLOPE)
    assert measured
    least = {"mlp": 4, "attention": 1}
    for site, width in there.items():
        if site.part in units:
            spent = TAKES[site.part] * (width - least[site.part])
            assert budget.unit_cost[site] * width == pytest.approx(spent, abs=SLOPE * width * TAKES[site.part])
    plan = plan_of(make_context, run_config, tmp_path, tmp_path / "uneven", 0.2, units)
    gone = sum((width - len(plan.kept.get(site.key, range(width)))) * TAKES[site.part] for site, width in there.items())
    gone += sum(not kept for key, kept in plan.kept.items() if key.endswith("block")) * TAKES["block"]
    assert gone >= 0.2 * dense * 0.999
    if "layer" not in units:  # a whole layer may be the least harm
        assert gone < 0.2 * dense + 4 * TAKES["mlp"]


def test_a_share_of_the_time_that_the_layers_do_not_take_is_refused(
    measured: list[int], heads: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="cannot be reached"):
        plan_of(make_context, run_config, tmp_path, heads, 0.97)
    assert measured


def test_trials_of_a_sweep_find_their_times(
    measured: list[int], heads: Path, run_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the machine, so the clock must not run while they do."""
    settings = {"units": ["mlp", "attention"], "allocation": "sensitivity", "budget": "latency", "multiple": 16}
    configs = [
        run_config(
            tmp_path,
            model={"path": str(heads)},
            method={"name": "wanda"},
            prune={**settings, "ratio": ratio, "latency": counted},
            run={"gpus_per_worker": 0},
        )
        for ratio, counted in ((0.2, "decode"), (0.3, "decode"), (0.2, "prefill"))
    ]
    before: list[int] = []

    def carry_out(sweep: Sweep, make_context: trials.MakeContext, progress: Progress) -> trials.Tried:
        del progress
        before.append(len(measured))
        for trial in sweep.trials:
            with make_context(trial) as context:
                prune(context, until="decide")
        return trials.Tried((), {})

    monkeypatch.setattr(trials, "carry_out", carry_out)
    each = tuple(Trial(str(number), "", config) for number, config in enumerate(configs))
    sweep = Sweep(configs[0], each, 2, timed=each)
    sweeps.carry_out(sweep, 1)
    assert before == [len(measured)]
    assert before[0] > 0
    tables = sorted(path.name for path in tmp_path.rglob("latency-*.json"))
    assert (len(tables), len(set(tables))) == (3, 2)
