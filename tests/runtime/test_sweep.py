"""Sweeps on Ray Tune: trials are the single runs, recording and scores are shared, a killed sweep goes on."""

import functools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cria_dist import config_file
from cria_dist.errors import ConfigError, NumericError, WorkerError
from cria_dist.pipeline import prune, results
from cria_dist.report.writer import report_from_json
from cria_dist.runtime import launch, trials
from cria_dist.runtime import sweep as sweeps
from cria_dist.stages.prepare import run_folder
from cria_dist.stages.recover import read_log
from cria_dist.stages.sweep import plan

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session"), pytest.mark.timeout(600)]

WriteSweep = Callable[..., Path]


@pytest.fixture
def write_sweep(
    run_tree: dict[str, Any], write_toml: Callable[[Path, dict[str, Any]], Path], tmp_path: Path
) -> WriteSweep:
    """``write_sweep(grid, concurrency=1, search=None, **run)``: the pico run with a grid; nothing is timed."""

    def write(grid: dict[str, Any], concurrency: int = 1, search: dict[str, Any] | None = None, **run: Any) -> Path:
        tree = {**run_tree, "run": {"root": str(tmp_path / "runs"), **run}, "method": {"name": "magnitude"}}
        tree["evaluate"] = {**run_tree["evaluate"], "latency_repeats": 0}
        return write_toml(
            tmp_path / "sweep.toml", {**tree, "sweep": {"concurrency": concurrency, "grid": grid, **(search or {})}}
        )

    return write


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading every checkpoint in a fresh process has tests of its own."""
    monkeypatch.setattr(results, "verify_exports", lambda *_: {})


def stopped(by: signal.Signals, path: Path, trials: int, *overrides: str) -> str:
    """Carry out a sweep in a process on the session's cluster until so many trials are done; returns what it said."""
    folder, address = plan(str(path)).folder / "trials", ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "cria_dist", "sweep", str(path), f"run.address={address}", *overrides]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while len(list(folder.glob("*.json"))) < trials:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.05)
        driver.send_signal(by)
        return driver.communicate()[0]
    finally:
        driver.kill()


def fails(which: Any, finish: Callable[..., Any], trial: Any, context: Any) -> Any:
    """Finish a trial, but one."""
    if trial.label == which.label:
        raise NumericError("it cannot be measured")
    return finish(trial, context)


@pytest.mark.usefixtures("unverified")
def test_trials_are_single_runs_and_a_failed_one_is_named(
    write_sweep: WriteSweep, make_context: Callable[..., Any], session: int, tmp_path: Path
) -> None:
    grid = {"recover": {"learning_rate": [1e-3, 1e30]}}
    sweep = plan(str(write_sweep(grid, pool="local")))
    with pytest.raises(WorkerError) as failure:
        sweeps.carry_out(sweep, session)
    sound, broken = sweep.trials
    assert str(failure.value).startswith(f"sweep: trial {broken.label}: recovery: the loss is nan at step 1")

    [one] = json.loads((sweep.folder / "sweep.json").read_text())["trials"]
    assert one["label"] == sound.label == "recover.learning_rate=0.001"
    path, *overrides = shlex.split(one["command"])[2:]
    report = report_from_json(run_folder(config_file.load(path, overrides)) / "report.json")
    assert one["after"]["perplexity"] == report.variants[-1].perplexity
    assert report.command == one["command"]
    assert (Path(one["checkpoint"]) / "model.safetensors").is_file()
    alone = prune(make_context(config_file.load(path, [*overrides, f"run.root={tmp_path / 'alone'}"])))
    assert alone is not None
    assert [one["dense"]["perplexity"], one["before"]["perplexity"], one["after"]["perplexity"]] == [
        variant.perplexity for variant in alone.variants if variant.label in ("dense", "repaired", "recovered")
    ]

    scores = [trial.folder / "round-00" / "scores" / "layer-000.mlp.npz" for trial in sweep.trials]
    assert len({path.stat().st_ino for path in scores}) == 1
    [best] = (sweep.folder / "best").iterdir()
    assert (best.name, best.resolve()) == ("25-of-units", Path(one["checkpoint"]).resolve())
    assert (sweep.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (sweep.folder / f"tune-{sweep.concurrency}").stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("unverified")
def test_another_attempt_tries_what_failed_and_nothing_is_lost_by_what_fails_later(
    write_sweep: WriteSweep, session: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = plan(str(write_sweep({"recover": {"learning_rate": [1e-3, 1e30]}}, pool="local")))
    sound, broken = sweep.trials
    with pytest.raises(WorkerError):
        sweeps.carry_out(sweep, session)
    outcomes = [sweep.folder / "trials" / f"{trial.folder.name}.json" for trial in sweep.trials]
    before = [path.read_bytes() for path in outcomes]
    scored = json.loads(before[0])
    evaluation = SimpleNamespace(accuracy=None, perplexity=scored["loss"], parameters=scored["parameters"])
    monkeypatch.setattr(trials, "prune_and_score", lambda context: [evaluation])  # the reason is gone
    monkeypatch.setattr(sweeps, "_finish", functools.partial(fails, broken, sweeps._finish))
    with pytest.raises(WorkerError, match=f"^sweep: trial {re.escape(broken.label)}: it cannot be measured$"):
        sweeps.carry_out(sweep, session)
    assert [path.read_bytes() == there for path, there in zip(outcomes, before, strict=True)] == [True, False]
    assert "error" not in json.loads(outcomes[1].read_text())
    [one] = json.loads((sweep.folder / "sweep.json").read_text())["trials"]
    assert one["label"] == sound.label


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.usefixtures("unverified")
def test_a_killed_sweep_goes_on_with_ray_workers_and_finds_the_same(
    write_sweep: WriteSweep, make_context: Callable[..., Any], session: int, tmp_path: Path
) -> None:
    path = write_sweep({"recover": {"steps": [0, 6]}})
    sweep = plan(str(path))
    stopped(signal.SIGKILL, path, 1, "run.pool=local")
    done = list((sweep.folder / "trials").glob("*.json"))
    assert not (sweep.folder / "sweep.json").exists()
    finished = done[0].stat().st_mtime_ns

    assert trials.tune.Tuner.can_restore(str(sweep.folder / f"tune-{sweep.concurrency}"))
    rows = sweeps.carry_out(sweep, 1)
    assert done[0].stat().st_mtime_ns == finished, "a finished trial was run again"
    assert len(rows) == 2
    for row in rows:
        overrides = shlex.split(row.command)[3:]
        alone = [*overrides, "run.pool=local", f"run.root={tmp_path / 'alone'}"]
        report = prune(make_context(config_file.load(path, alone)))
        assert report is not None
        perplexity = {one.label: one.perplexity for one in report.variants}
        assert (row.dense.perplexity, row.before.perplexity) == (perplexity["dense"], perplexity["repaired"])
        assert row.after.perplexity == perplexity[row.after.label]
    assert [row.after.label for row in rows] == ["repaired", "recovered"]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.usefixtures("unverified")
def test_a_search_tries_what_it_has_not_tried_and_goes_on(
    write_sweep: WriteSweep, session: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five trials of four possible ones at either ratio: what is chosen again is not computed again."""
    space = {"recover": {"steps": [0, 2], "learning_rate": [1e-3, 2e-3]}}
    search = {"search": "optuna", "trials": 5, "space": space}
    sweep = plan(str(write_sweep({"prune": {"ratio": [0.25, 0.5]}}, 2, search, pool="local")))
    rows = sweeps.carry_out(sweep, session)
    assert len(list((sweep.folder / "trials").glob("*.json"))) == len(rows) == len({row.command for row in rows})
    for search in sweep.searches:
        mine = [row for row in rows if search.point[0] in row.label]
        assert 1 <= len(mine) <= 4
        assert all(row.label.startswith(search.point[0]) for row in mine)
    times = [path.stat().st_mtime_ns for path in sorted((sweep.folder / "trials").glob("*.json"))]
    assert [row.after.perplexity for row in sweeps.carry_out(sweep, session)] == [row.after.perplexity for row in rows]
    assert times == [path.stat().st_mtime_ns for path in sorted((sweep.folder / "trials").glob("*.json"))]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.usefixtures("unverified")
def test_a_recovery_that_falls_behind_is_stopped_stays_so_and_its_command_goes_on(
    write_sweep: WriteSweep, make_context: Callable[..., Any], session: int, tmp_path: Path
) -> None:
    """Of two learning rates one is far too small to learn anything by."""
    grid = {"recover": {"steps": [8], "patience": [9], "learning_rate": [2e-3, 1e-9]}}
    asha = {"scheduler": "asha", "grace_steps": 4, "reduction_factor": 2}
    sweep = plan(str(write_sweep(grid, 1, asha, pool="local")))
    good, bad = sweeps.carry_out(sweep, session)
    [log_path] = sweep.trials[1].folder.glob("recover/loss-*.jsonl")
    before = read_log(log_path)
    assert bad.stopped == f"stopped after 4 of 8 steps, held-out loss {before[-1]['held_out']:.4f}"
    assert (good.stopped, good.after.label, bad.after.label, len(before)) == (None, "recovered", "repaired", 4)
    assert not (sweep.trials[1].folder / "recovered").exists()
    [link] = (sweep.folder / "best").iterdir()
    assert link.resolve() == good.checkpoint
    told = json.loads((sweep.folder / "sweep.json").read_text())["trials"]
    assert [one.get("stopped") for one in told] == [None, bad.stopped]
    protocol = report_from_json(sweep.trials[1].folder / "report.json").protocol
    assert protocol[-1].startswith(f"Recovery: {bad.stopped}; a sweep stopped it")

    shutil.rmtree(sweep.folder / f"tune-{sweep.concurrency}")
    shutil.rmtree(sweep.folder / "trials")  # as if the driver had died before it wrote down what it knew
    again = sweeps.carry_out(sweep, session)
    assert read_log(log_path) == before
    assert [(row.stopped, row.after.perplexity) for row in again] == [
        (row.stopped, row.after.perplexity) for row in (good, bad)
    ]

    path, *overrides = shlex.split(bad.command)[2:]
    launch.run(config_file.load(path, overrides))
    assert read_log(log_path)[:4] == before, "finished steps were repeated"
    assert len(read_log(log_path)) == 8
    ended = sweeps.carry_out(sweep, session)[1]
    alone = prune(make_context(config_file.load(path, [*overrides, f"run.root={tmp_path / 'alone'}"])))
    assert alone is not None
    assert (ended.stopped, ended.after.label) == (None, "recovered")
    assert ended.after.perplexity == alone.variants[-1].perplexity


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("unverified")
def test_trials_that_train_on_workers_race_and_an_interrupted_sweep_goes_on(
    write_sweep: WriteSweep, session: int
) -> None:
    """The second of three is stopped, then the driver is."""
    grid = {"recover": {"steps": [8], "patience": [9], "learning_rate": [2e-3, 1e-9, 4e-3]}}
    path = write_sweep(grid, 1, {"scheduler": "asha", "grace_steps": 4, "reduction_factor": 2}, workers=1)
    sweep, said = plan(str(path)), stopped(signal.SIGINT, path, 2)
    assert said.endswith("interrupted; run the same command again to continue from what is finished\n")
    assert not (sweep.folder / "sweep.json").exists()
    done = list((sweep.folder / "trials").glob("*.json"))
    logs = [next(trial.folder.glob("recover/loss-*.jsonl")) for trial in sweep.trials[:2]]
    assert [len(read_log(log)) for log in logs] == [8, 4]
    before = [file.stat().st_mtime_ns for file in (*done, *logs)]

    rows = sweeps.carry_out(sweep, session)
    assert [file.stat().st_mtime_ns for file in (*done, *logs)] == before, "a finished trial was run again"
    assert [row.after.label for row in rows] == ["recovered", "repaired", "recovered"]
    loss = read_log(logs[1])[-1]["held_out"]
    said = f"stopped after 4 of 8 steps, held-out loss {loss:.4f}"
    assert [row.stopped for row in rows] == [None, said, None]
    told = json.loads((sweep.folder / "sweep.json").read_text())["trials"]
    assert [one.get("stopped") for one in told] == [None, said, None]
    [best] = (sweep.folder / "best").iterdir()
    assert best.resolve() in (rows[0].checkpoint, rows[2].checkpoint)
    assert len(read_log(next(sweep.trials[2].folder.glob("recover/loss-*.jsonl")))) == 8


def test_more_training_workers_than_there_are_places_is_an_error_at_once(write_sweep: WriteSweep, session: int) -> None:
    sweep = plan(str(write_sweep({"prune": {"ratio": [0.25, 0.5]}}, concurrency=99)))
    with pytest.raises(ConfigError, match=r"^sweep.concurrency=99 trials need 99 CPUs .* has \d+; lower"):
        sweeps.carry_out(sweep, 99)
    with pytest.raises(ConfigError, match=r"^sweep.concurrency=99 is more than there are workers \(2\)"):
        sweeps.carry_out(sweep, session)
    assert not sweep.folder.exists()
