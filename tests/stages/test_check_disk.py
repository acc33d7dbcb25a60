"""What is written already need not fit again: a run goes on where it would not have room to begin."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.pipeline import prune
from cria_dist.stages.estimate import bytes_of_run
from cria_dist.stages.job import Job
from cria_dist.stages.prepare import prepare

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Any]


def parts_of(job: Job) -> dict[str, int]:
    return bytes_of_run(job.config, job.model_config, job.family, job.dense_parameters)


@pytest.fixture
def recorded(run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> Job:
    context = make_context(run_config(tmp_path, record={"schedule": "sweep"}), until="record")
    prune(context, until="record")
    return context.job


def test_a_run_goes_on_where_it_began(recorded: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, used = sum(parts_of(recorded).values()), files.bytes_below(recorded.folder)
    free = int(1.2 * needed) - used
    assert free < needed
    monkeypatch.setattr(files, "free_bytes", lambda path: free)
    assert prepare(recorded.config).digests == recorded.digests
    (recorded.folder / "round-00" / "manifest.json").unlink()  # it was interrupted before the last word
    assert prepare(recorded.config).digests == recorded.digests


def test_a_neighbours_recording_comes_as_links(
    recorded: Job, run_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(recorded)
    left = parts["inputs"] + parts["repair"] + parts["checkpoints"] + parts["recovery_state"]
    monkeypatch.setattr(files, "free_bytes", lambda path: left)
    other = run_config(tmp_path, record={"schedule": "sweep"}, prune={"ratio": 0.5})
    assert prepare(other).folder != recorded.folder
    monkeypatch.setattr(files, "free_bytes", lambda path: left // 2)
    with pytest.raises(ConfigError, match=r"the run needs .* are free; lower record\.tokens"):
        prepare(other)
    monkeypatch.setattr(files, "free_bytes", lambda path: left)
    for changed in ({"seed": 1}, {"prune": {"rounds": 2}}):  # of another recording, and of a second one
        with pytest.raises(ConfigError, match=r"the run needs .* are free; lower record\.tokens"):
            prepare(run_config(tmp_path, record={"schedule": "sweep"}, **changed))


def test_a_finished_run_needs_nothing(finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run.copy(tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda path: 0)
    prepare(run.config)
    (run.folder / "report.json").unlink()
    checkpoints = files.bytes_below(run.folder / "recovered") + files.bytes_below(run.folder / "pruned")
    monkeypatch.setattr(files, "free_bytes", lambda path: checkpoints // 2)
    prepare(run.config)


def test_what_the_repair_of_every_method_leaves_is_counted_and_counted_once(
    finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run.copy(tmp_path)
    (run.folder / "report.json").unlink()
    parts, folders = parts_of(prepare(run.config)), sorted(run.folder.rglob("repair"))
    assert len(folders) == 3  # the run's own method and two others
    there = sum(map(files.bytes_below, folders))
    assert there <= parts["repair"] <= 1.5 * there
    checkpoints = sum(files.bytes_below(run.folder / name) for name in ("pruned", "recovered"))
    left = max(0, parts["checkpoints"] - checkpoints) + parts["repair"] - there
    monkeypatch.setattr(files, "free_bytes", lambda path: left)
    prepare(run.config)
    for folder in folders:
        shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="the run needs"):
        prepare(run.config)


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [
        ("llama", {"rounds": 2}),
        ("llama", {"units": ["mlp", "attention"], "budget": "parameters"}),
        ("gemma2", {"units": ["residual"]}),
        ("mixtral", {"units": ["residual"]}),
    ],
)
def test_what_repairs_leave_is_known_beforehand(
    model_type: str,
    asked: dict[str, Any],
    make_model: Callable[..., Path],
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    model = {"path": str(make_model(tmp_path / "model", model_type, **experts))}
    context = make_context(run_config(tmp_path, model=model, method={"name": "activation"}, prune=asked), until="apply")
    prune(context, until="apply")
    there = sum(map(files.bytes_below, context.job.folder.glob("round-*/repair")))
    assert there <= parts_of(context.job)["repair"] <= 2 * there  # of two KV groups one goes
