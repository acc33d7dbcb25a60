"""Runs that prune by learned gates: whole, resumed, in rounds, and beside another method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cria_dist.config import RunConfig
from cria_dist.methods import Eigenvalue, Wanda
from cria_dist.models.checkpoint import WEIGHTS
from cria_dist.pipeline import Context, prune, results, rounds
from cria_dist.pipeline.learn import learn_gates
from cria_dist.records import PruningPlan, Site
from cria_dist.stages import training
from cria_dist.stages.learn import LearnTask
from cria_dist.stages.recover_log import read_log
from cria_dist.stages.recover_step import Place
from cria_dist.store import site_scores

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

SHORT = {"steps": 4, "batch_sequences": 2, "sequence_length": 32, "learning_rate": 0.1}
EIGENVALUE = {"name": "eigenvalue", **SHORT}
RECEDING = {"name": "receding", **SHORT}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that training workers were asked to carry out."""
    stages: list[str] = []
    carry_out = training.carry_out

    def note(task: Any, place: Place, resume: Path | None, save: Any) -> None:
        stages.append(training.stage_of(task))
        carry_out(task, place, resume, save)

    monkeypatch.setattr(training, "carry_out", note)
    return stages


@pytest.mark.parametrize("method", [EIGENVALUE, RECEDING], ids=lambda one: one["name"])
def test_the_lowest_gates_go(
    method: dict[str, Any], run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context(run_config(tmp_path, method=method), until="apply")
    prune(context, until="apply")
    folder = context.job.folder / "round-00"
    plan = PruningPlan.from_json((folder / "plan.json").read_text())
    with np.load(folder / "learn/gates.npz") as arrays:
        for key, kept in plan.kept.items():
            keep_N = context.job.config.method.importance(arrays[key])
            np.testing.assert_array_equal(site_scores.read_scores(folder, Site.from_key(key)).keep_N, keep_N)
            assert len(set(keep_N)) > 40
            assert set(kept) == set(np.argsort(-keep_N)[:36].tolist())
    dense, pruned = (load_file(one / WEIGHTS) for one in (context.job.model_dir, context.job.folder / "pruned"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(pruned[name], dense[name][list(plan.kept["layer-001.mlp"])]), "the gates are a criterion only"


@pytest.mark.usefixtures("no_fresh_process")
def test_a_whole_run(run_config: RunConfigMaker, make_context: MakeContext, trained: list[str], tmp_path: Path) -> None:
    context = make_context(
        run_config(tmp_path, method=EIGENVALUE, compare=[RECEDING, EIGENVALUE], recover={"steps": 2})
    )
    report = prune(context)
    assert report is not None
    assert [one.label for one in report.variants] == ["dense", "pruned", "repaired", "recovered"]
    assert [one.label for one in report.comparison] == ["receding"] * 2 + ["eigenvalue"] * 2
    assert {stage.stage for stage in report.stages} >= {"analyse: learn", "compare receding: analyse: learn"}
    assert trained == ["learn", "learn", "recover"], "the compared eigenvalues are those of the run itself"
    own, same = (
        next(one for one in these if one.method == "eigenvalue" and one.repair == "none")
        for these in (report.variants, report.comparison)
    )
    assert own.perplexity == same.perplexity


def test_gates_that_are_there_are_not_learned_again(
    run_config: RunConfigMaker, make_context: MakeContext, trained: list[str], tmp_path: Path
) -> None:
    config = run_config(tmp_path, method=EIGENVALUE)
    prune(make_context(config), until="decide")
    [folder] = (tmp_path / "runs").iterdir()
    gates, scores = folder / "round-00/learn/gates.npz", folder / "round-00/scores/layer-001.mlp.npz"
    content, scored = gates.read_bytes(), scores.read_bytes()
    scores.unlink()
    prune(make_context(config), until="decide")
    assert trained == ["learn"]
    assert scores.read_bytes() == scored
    scores.unlink()
    gates.write_bytes(content[:-40])
    prune(make_context(config), until="decide")
    assert trained == ["learn", "learn"]
    assert (gates.read_bytes(), scores.read_bytes()) == (content, scored)


def test_every_round_learns_on_the_model_the_last_one_left(
    run_config: RunConfigMaker, make_context: MakeContext, trained: list[str], tmp_path: Path
) -> None:
    context = make_context(run_config(tmp_path, method=RECEDING, prune={"rounds": 2, "ratio": 0.5}), until="decide")
    prune(context, until="decide")
    assert trained == ["learn", "learn"]
    widths = []
    for index in (0, 1):
        with np.load(context.job.folder / f"round-{index:02d}/learn/gates.npz") as arrays:
            widths.append(len(arrays["layer-000.mlp"]))
    assert widths == [48, 36]


def test_gates_are_of_one_model_one_method_and_one_seed(
    run_config: RunConfigMaker, make_context: MakeContext, trained: list[str], tmp_path: Path
) -> None:
    context = make_context(run_config(tmp_path))
    method = Eigenvalue(**SHORT)

    def num_learned(model_digest: str, method: Any, context: Context = context) -> int:
        trained.clear()
        assert learn_gates(context, "learn", tmp_path / "a", context.job.model_dir, model_digest, method) is not None
        return len(trained)

    assert [num_learned("m1", method), num_learned("m1", method), num_learned("m2", method)] == [1, 0, 1]
    assert num_learned("m2", method.model_copy(update={"l1": 0.5})) == 1
    assert num_learned("m2", method.model_copy(update={"l1": 0.5}), make_context(run_config(tmp_path, seed=1))) == 1
    assert learn_gates(context, "learn", tmp_path, context.job.model_dir, "m1", Wanda()) is None


def test_steps_are_followed_and_the_workers_are_let_go(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, released = make_context(run_config(tmp_path)), list[str]()
    monkeypatch.setattr(type(context.pool), "release", lambda pool: released.append("pool"))
    names: list[tuple[str, Path]] = []

    def train(task: Any, name: str, storage: Path) -> None:
        assert isinstance(task, LearnTask)
        assert released == ["pool"], "training workers need the processors"
        names.append((name, storage))
        context.train(task, name, storage)

    watched = Context(context.job, context.pool, train, context.progress)
    gates = learn_gates(watched, "learn", tmp_path / "a", context.job.model_dir, "m1", Eigenvalue(**SHORT))
    assert gates is not None
    assert names == [(f"learn-{gates.digest[:12]}", tmp_path / "a" / "learn")]
    [log_path] = (tmp_path / "a" / "learn").glob("loss-*.jsonl")
    assert len(read_log(log_path)) == 4


def test_compared_methods_keep_their_gates_apart(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, compare=[EIGENVALUE, {**EIGENVALUE, "variant": "all"}, {"name": "flap"}])
    context = make_context(config)
    recording = rounds.record_round(context, 0, rounds.dense_model(context))
    variants = results.comparison_variants(context, recording)
    titles = ["eigenvalue", "eigenvalue (all)", "flap"]
    assert [variant.label for variant, _ in variants] == [title for title in titles for _ in range(2)]
    there = sorted(path.parts[-3] for path in context.job.folder.glob("comparison/*/learn/gates.npz"))
    assert there == ["00-eigenvalue", "01-eigenvalue"]
