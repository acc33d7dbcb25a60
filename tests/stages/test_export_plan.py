"""``cria apply-plan``: the same bytes from the plan and the base model, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from cria_dist import cli
from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.pipeline import prune
from tests.conftest import FinishedRun


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["apply-plan", *map(str, arguments)], env={"COLUMNS": "200"})


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same files, cards aside."""
    names = [sorted(path.name for path in one.iterdir() if path.suffix != ".md") for one in (first, second)]
    return names[0] == names[1] and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names[0]
    )


def test_a_repaired_checkpoint_comes_out_again(finished_run: FinishedRun, pico: Path, tmp_path: Path) -> None:
    written = call(finished_run.folder / "pruned" / "plan.json", pico, tmp_path / "again")
    assert written.exit_code == 0, written.output
    assert "round-00/repair" in written.output
    assert same_bytes(tmp_path / "again", finished_run.folder / "pruned")


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": {"rounds": 2, "repair": "bias"}},
        {"prune": {"allocation": "global", "repair": "none"}, "method": {"name": "flap"}},
        {
            "prune": {"units": ["mlp", "attention"], "budget": "parameters", "allocation": "global"},
            "method": {"name": "flap"},
        },
        {"method": {"name": "spectrum_preserving"}},
        {"method": {"name": "block_influence"}, "prune": {"ratio": 0.5}},
    ],
    ids=["two rounds with biases", "widths per layer", "neurons and heads", "single weights", "whole layers"],
)
def test_so_does_every_other_kind(
    changes: dict[str, Any], run_config: Callable[..., RunConfig], make_context: Callable[..., Any], tmp_path: Path
) -> None:
    config = run_config(tmp_path, **changes)
    context = make_context(config, until="apply")
    prune(context, until="apply")
    context.progress.close("done")
    folder = context.job.folder
    written = call(folder / "pruned" / "plan.json", config.model.path, tmp_path / "again")
    assert written.exit_code == 0, written.output
    assert same_bytes(tmp_path / "again", folder / "pruned")


def test_the_tensors_can_be_named(finished_run: FinishedRun, pico: Path, tmp_path: Path) -> None:
    alone = tmp_path / "plan.json"
    shutil.copyfile(finished_run.folder / "pruned" / "plan.json", alone)
    repair = finished_run.folder / "round-00" / "repair"
    assert call(alone, pico, tmp_path / "again", "--replaced", repair).exit_code == 0
    assert same_bytes(tmp_path / "again", finished_run.folder / "pruned")
    bare = call(alone, pico, tmp_path / "bare")
    assert "with no replaced tensors" in bare.output
    name = "model.layers.0.mlp.down_proj.weight"
    weights = [load_file(one / checkpoint.WEIGHTS)[name] for one in (tmp_path / "bare", tmp_path / "again")]
    assert weights[0].shape == weights[1].shape
    assert (weights[0] != weights[1]).any()


def test_mistakes_are_told_and_leave_nothing(
    finished_run: FinishedRun, pico: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    run = finished_run.copy(tmp_path).folder
    plan = run / "pruned" / "plan.json"
    other = make_model(tmp_path / "other", num_hidden_layers=3)
    assert "the plan is of a model with" in call(plan, other, tmp_path / "out").stderr
    assert "is there already" in call(plan, pico, run).stderr
    twin = make_model(tmp_path / "twin", hidden_act="gelu")  # as many parameters
    assert "pruned/plan.json was made of other weights than" in call(plan, twin, tmp_path / "out").stderr
    beside = run / "round-00" / "plan.json"
    record = json.loads(beside.read_text())
    units = record["kept"]["layer-000.mlp"]
    record["kept"]["layer-000.mlp"] = sorted(
        [*units[1:], min({*range(48)} - {*units})]
    )  # as many, but for one the same
    whole = beside.read_text()
    beside.write_text(json.dumps(record))
    alone = tmp_path / "plan.json"
    shutil.copyfile(plan, alone)
    replaced = ["--replaced", run / "round-00" / "repair"]
    assert "round-00/repair was made of other weights" in call(alone, twin, tmp_path / "out", *replaced).stderr
    assert "is of another plan" in call(alone, pico, tmp_path / "out", "--replaced", run / "round-00" / "repair").stderr
    beside.write_text(whole)
    (run / "round-00" / "repair" / "layer-001.mlp.safetensors").unlink()
    assert "has no whole tensors of layer-001.mlp" in call(plan, pico, tmp_path / "out").stderr
    assert "cannot be read" in call(run / "no.json", pico, tmp_path / "out").stderr
    record = json.loads(plan.read_text())
    plan.write_text(json.dumps({**record, "parameters": None}))
    assert "is damaged" in call(plan, pico, tmp_path / "out").stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
