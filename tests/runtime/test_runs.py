"""Whole runs on Ray: equal to this process, for any number of workers, through SIGKILL in every stage."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cria_dist.config_file import parse
from cria_dist.pipeline import Context, prune
from cria_dist.report.progress import Progress
from cria_dist.report.writer import report_from_json
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages.prepare import prepare
from cria_dist.stages.recover import read_log

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

START = "import sys; from cria_dist.cli import main; sys.exit(main(sys.argv[1:], until='prune'))"


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("workers", [1, 2])
def test_plan_does_not_depend_on_the_workers(
    run_config: Callable[..., Any], finished_run: Any, tmp_path: Path, workers: int
) -> None:
    config = run_config(tmp_path)
    job = prepare(config)
    pool = RayPool(workers)
    prune(Context(job, pool, RayTrainer(1, use_gpu=False), Progress(None)), until="apply")
    pool.release()
    there = finished_run.folder
    for artefact in ("round-00/plan.json", "round-00/manifest.json", "pruned/model.safetensors"):
        assert (job.folder / artefact).read_bytes() == (there / artefact).read_bytes(), artefact


@pytest.mark.usefixtures("session")
def test_a_sequential_repair_does_not_depend_on_the_workers(
    run_config: Callable[..., Any], make_context: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Many steps that wait for each other, also past a layer that keeps its units; the weights are those of one
    process, to the bit.
    """
    model = make_model(tmp_path / "model", num_hidden_layers=4)
    found = []
    for name, pool in (("here", None), ("there", RayPool(2))):
        prune_config = {"repair": "sequential", "allocation": "global", "protect": [1]}
        changes = {"model": {"path": str(model)}, "prune": prune_config, "method": {"name": "wanda"}}
        config = run_config(tmp_path / name, **changes)
        context = make_context(config, pool)
        prune(context, until="apply")
        context.pool.release()
        found.append((context.job.folder / "pruned/model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.usefixtures("session")
def test_two_training_workers_equal_one(run_config: Callable[..., Any], finished_run: Any, tmp_path: Path) -> None:
    recover = finished_run.config.recover.model_copy(update={"workers": 2})
    config = run_config(tmp_path).model_copy(update={"recover": recover})
    job = prepare(config)
    pool = RayPool(2)
    prune(Context(job, pool, RayTrainer(2, use_gpu=False), Progress(job.folder)), until="recover")
    [ours] = (job.folder / "recover").glob("loss-*.jsonl")
    [theirs] = (finished_run.folder / "recover").glob("loss-*.jsonl")
    one = [json.loads(line)["loss"] for line in theirs.read_text().splitlines()]
    two = [json.loads(line)["loss"] for line in ours.read_text().splitlines()]
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
@pytest.mark.soak
def test_killed_in_every_stage_it_continues_and_decides_the_same(
    run_tree: dict[str, Any], write_toml: Callable[[Path, dict[str, Any]], Path], finished_run: Any, tmp_path: Path
) -> None:
    tree = {**run_tree, "run": {"root": str(tmp_path / "runs"), "workers": 2}}
    tree["compare"] = [{"name": "random"}, {"name": "magnitude"}]
    tree["recover"] = {**run_tree["recover"], "steps": 40, "checkpoint_every": 5}
    config_path = write_toml(tmp_path / "run.toml", tree)
    assert parse(tree).method == finished_run.config.method
    for stage in ("record", "analyse", "recover", "evaluate"):
        _run_and_kill(config_path, tmp_path / "runs", stage)
    finished = subprocess.run(
        [sys.executable, "-c", START, str(config_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    [folder] = (tmp_path / "runs").iterdir()
    plan = (folder / "round-00/plan.json").read_bytes()
    assert plan == (finished_run.folder / "round-00/plan.json").read_bytes()
    report = report_from_json(folder / "report.json")
    assert [one.label for one in report.variants] == ["dense", "pruned", "repaired", "recovered"]
    assert [step for step, _ in report.loss] == list(range(1, 41))
    events = [json.loads(line)["message"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any(event.startswith("record: complete") for event in events)
    assert sum(event.startswith("record 3/3") for event in events) == 1  # finished once, never computed twice


@pytest.mark.slow
@pytest.mark.soak
def test_killed_while_workers_share_the_model_it_goes_on_from_its_checkpoint(
    run_tree: dict[str, Any], write_toml: Callable[[Path, dict[str, Any]], Path], tmp_path: Path
) -> None:
    """As if it had not been killed, without a finished step done again, best weights and all."""
    steps = {"steps": 150, "checkpoint_every": 10, "patience": 99}
    tree = {**run_tree, "recover": {**run_tree["recover"], "strategy": "fsdp2", "workers": 2, **steps}}
    killed, whole = (
        write_toml(tmp_path / f"{name}.toml", {**tree, "run": {"root": str(tmp_path / name), "workers": 2}})
        for name in ("killed", "whole")
    )
    _run_and_kill(killed, tmp_path / "killed", "recover")
    [folder] = (tmp_path / "killed").iterdir()
    [log_path] = folder.glob("recover/loss-*.jsonl")
    before = _log_of_the_dead(log_path)
    [snapshot] = folder.glob("recover/*/checkpoint_manager_snapshot.json")
    kept = max(int(step) for step in re.findall(r'"step": *(\d+)', snapshot.read_text()))
    assert 10 <= kept <= len(before) < 150
    assert not (folder / "recovered").exists()

    logs, weights = [], []
    for path in (killed, whole):
        command = [sys.executable, "-m", "cria_dist", "recover", str(path)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        [folder] = (tmp_path / path.stem).iterdir()
        logs.append(read_log(next(folder.glob("recover/loss-*.jsonl"))))
        weights.append(load_file(folder / "recovered" / "model.safetensors"))
    assert logs[0][:kept] == before[:kept], "finished steps were done again"
    for name in ("loss", "held_out"):
        ours, theirs = ({line["step"]: line[name] for line in log if name in line} for log in logs)
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(logs[0]) == 150
    assert all(np.allclose(weights[0][name], other, atol=1e-5) for name, other in weights[1].items())


def _log_of_the_dead(path: Path) -> list[dict[str, Any]]:
    """The log of a recovery whose driver was killed, when its workers have noticed."""
    log, since = read_log(path), time.monotonic()
    while time.monotonic() - since < 5:
        time.sleep(0.2)
        if len(now := read_log(path)) > len(log):
            log, since = now, time.monotonic()
    return log


def _run_and_kill(config: Path, root: Path, stage: str) -> None:
    """Start the job, wait until the stage runs (and training has passed a checkpoint), SIGKILL the driver."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    enough = 12 if stage == "recover" else 0
    try:
        while (status := _status(root)).get("stage") != stage or status["done"] < enough:
            assert process.poll() is None, f"ended before {stage} could be killed"
            assert time.monotonic() < deadline, f"{stage} did not start"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def _status(root: Path) -> dict[str, Any]:
    for path in root.glob("*/progress.json"):
        return json.loads(path.read_text())
    return {}
