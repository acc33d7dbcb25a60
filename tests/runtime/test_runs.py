"""Whole runs on Ray: equal to this process, for any number of workers, through SIGKILL in every stage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config_file import parse
from cria_dist.pipeline import Context, prune
from cria_dist.report.progress import Progress
from cria_dist.report.writer import report_from_json
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages.prepare import prepare

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


def _run_and_kill(config: Path, root: Path, stage: str) -> None:
    """Start the job, wait until the stage runs (and training has passed a checkpoint), SIGKILL the driver."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    enough = 12 if stage == "recover" else 0
    while True:
        assert process.poll() is None, f"ended before {stage} could be killed"
        assert time.monotonic() < deadline, f"{stage} did not start"
        status = _status(root)
        if status.get("stage") == stage and status["done"] >= enough:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _status(root: Path) -> dict[str, Any]:
    for path in root.glob("*/progress.json"):
        return json.loads(path.read_text())
    return {}
