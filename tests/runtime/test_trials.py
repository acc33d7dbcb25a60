"""Trials without a cluster: where they stand, what they are given, what becomes of one that fails."""

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.execution.class_cache import _ActorClassCache

from cria_dist.errors import NumericError
from cria_dist.report.progress import Progress
from cria_dist.runtime import sweep as sweeps
from cria_dist.runtime import trials
from cria_dist.runtime.experiments import experiments
from cria_dist.stages.sweep import Sweep, plan
from cria_dist.stages.trial import Trial

BASE = 'name = "s"\nmodel = { path = "builtin:smollm2-135m" }\nrun = { root = "ROOT", pool = "local" }\n'
RATIOS = "[sweep.grid]\nprune.ratio = [0.2, 0.3]\n"
TOGETHER = (
    "[sweep]\nsearch = 'optuna'\n[sweep.space]\n"
    "prune.allocation = ['uniform', 'sensitivity']\nprune.rounds = [1, 2]\nrecover.distill = { min = 0.1, max = 0.9 }\n"
)
"""Every value is valid beside the first ones; sensitivity in two rounds is not."""

WritePlan = Callable[..., Sweep]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WritePlan:
    """``planned(sweep, root="runs")``: a sweep whose driver stands in ``tmp_path/driver``."""
    (tmp_path / "driver").mkdir()
    monkeypatch.chdir(tmp_path / "driver")

    def make(text: str, root: str = "runs") -> Sweep:
        path = tmp_path / "sweep.toml"
        path.write_text(BASE.replace("ROOT", root) + text)
        return plan(str(path))

    return make


@pytest.fixture
def tune_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """``tune_elsewhere(configs)``: Tune chooses these, and its processes start in another directory."""
    raylet = tmp_path / "raylet"
    raylet.mkdir()
    monkeypatch.setattr(trials, "prune_and_score", lambda context: [context.evaluation])

    def choose(configs: Sequence[Mapping[str, Any]]) -> None:
        def fit(trainable: Callable[..., Any]) -> list[SimpleNamespace]:
            driver = Path.cwd()
            os.chdir(raylet)
            results = [SimpleNamespace(config=one, metrics=trainable(one), error=None) for one in configs]
            os.chdir(driver)
            return results

        monkeypatch.setattr(
            trials, "_tuner", lambda sweep, experiment, trainable: SimpleNamespace(fit=lambda: fit(trainable))
        )

    return choose


@contextmanager
def surroundings(trial: Trial) -> Generator[Any]:
    """Those of a trial that leaves its run folder."""
    trial.folder.mkdir(parents=True)
    yield SimpleNamespace(evaluation=SimpleNamespace(accuracy=None, perplexity=9.0, parameters=7))


def test_relative_paths_mean_in_a_trial_what_they_mean_to_the_driver(
    planned: WritePlan, tune_elsewhere: Callable[..., None], tmp_path: Path
) -> None:
    sweep = planned(RATIOS)
    tune_elsewhere([{"number": 0}, {"number": 1}])
    found = trials.carry_out(sweep, surroundings, Progress(None))
    assert (found.trials, found.failures) == (sweep.trials, {})
    assert all(trial.folder.is_dir() for trial in sweep.trials)
    assert sweep.trials[0].folder.parent == tmp_path / "driver" / "runs"
    assert not list((tmp_path / "raylet").iterdir())


@pytest.mark.usefixtures("planned")
def test_a_node_without_the_drivers_directory_is_an_error_where_the_runs_are_meant_from_there(tmp_path: Path) -> None:
    here = Path.cwd()
    with pytest.raises(trials.ConfigError, match=r"^run.root='runs' is meant from /gone, where node .* cannot go"):
        trials._work_in(Path("/gone"), "runs")
    trials._work_in(Path("/gone"), str(tmp_path))
    assert Path.cwd() == here


def test_values_that_do_not_go_together_are_one_failure_and_what_is_finished_is_not_repeated(
    planned: WritePlan, tune_elsewhere: Callable[..., None], tmp_path: Path
) -> None:
    sweep = planned(TOGETHER)
    sound = {"prune.allocation": 0, "prune.rounds": 1, "recover.distill": 0.5}
    tune_elsewhere([{**sound, "prune.allocation": 1}, sound])
    (tmp_path / "sweep.toml").write_text("it was edited since")
    for _ in range(2):  # surroundings() would not make the folder a second time
        found = trials.carry_out(sweep, surroundings, Progress(None))
        assert [trial.label for trial in found.trials] == [
            "prune.allocation=uniform prune.rounds=2 recover.distill=0.5"
        ]
        [(label, reason)] = found.failures.items()
        assert label == "prune.allocation=sensitivity prune.rounds=2 recover.distill=0.5"
        assert reason.startswith("prune=")


def test_the_process_of_a_trial_is_given_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in its runtime_env is shown in the dashboard."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "secret")
    trials._set_up_tune()
    actor = _ActorClassCache().get(type("Trainable", (), {}))
    given = actor._default_options["runtime_env"]["env_vars"]
    assert "secret" not in given.values()
    assert given["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


@pytest.mark.parametrize("mode", [0o770, 0o2770, 0o705])
def test_pickles_that_others_could_have_written_are_not_read(
    planned: WritePlan, mode: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However often the sweep goes on: some volumes are given their group anew each time they are mounted."""
    sweep = planned(RATIOS)
    folder, trap = sweep.folder / f"tune-{sweep.concurrency}", tmp_path / "read"
    folder.mkdir(parents=True)
    for name in ("tuner.pkl", "trainable.pkl"):
        (folder / name).write_bytes(f"cos\nsystem\n(S'touch {trap}'\ntR.".encode())
    (folder / "experiment_state-1.json").write_text("{}")
    folder.chmod(mode)
    for _ in range(2):
        caplog.clear()
        tuner = trials._tuner(sweep, next(experiments(sweep)), lambda config: None)
        [warning] = caplog.messages
        assert warning.startswith(f"{folder} holds pickles and is not this user's alone, so it is not read")
        fresh = sweep.folder / tuner._local_tuner.get_run_config().name
        assert (fresh != folder, fresh.stat().st_mode & 0o777) == (True, 0o700)
    assert not trap.exists()


def test_the_folder_of_tune_is_this_users_alone(planned: WritePlan, caplog: pytest.LogCaptureFixture) -> None:
    sweep = planned(RATIOS)
    for _ in range(2):  # the first may have ended before Tune wrote anything
        trials._tuner(sweep, next(experiments(sweep)), lambda config: None)
    assert (sweep.folder / f"tune-{sweep.concurrency}").stat().st_mode & 0o777 == 0o700
    assert not caplog.messages


@pytest.fixture
def share(planned: WritePlan, monkeypatch: pytest.MonkeyPatch) -> sweeps.Share:
    """Of a sweep whose times are a budget; nothing is prepared."""
    monkeypatch.setattr(sweeps, "prepare", lambda config, until: SimpleNamespace(folder=trial_folder(config)))
    latency = "prune.budget = 'latency'\nprune.allocation = 'sensitivity'\n"
    return sweeps.Share(planned(latency + RATIOS), 1, 0.0)


def trial_folder(config: Any) -> Path:
    """Its run folder."""
    return Trial("", "", config).folder


def state(trial: Trial) -> str:
    """What `cria status` is told."""
    return json.loads((trial.folder / "progress.json").read_text())["state"]


def test_the_folder_of_a_trial_says_how_it_ended(share: sweeps.Share) -> None:
    sound, broken = share.sweep.trials
    with share.context(sound) as context:
        context.progress.note("works")
    with pytest.raises(NumericError), share.context(broken), broken_stage():
        pass
    assert (state(sound), state(broken)) == ("done", "failed")


@contextmanager
def broken_stage() -> Generator[None]:
    """A part of a run that fails."""
    yield
    raise NumericError("does not load")


@pytest.mark.parametrize("where", ["prepare", "work"])
@pytest.mark.parametrize("step", [sweeps._share_scores, sweeps._share_times])
def test_what_fails_for_one_trial_before_it_begins_does_not_end_the_sweep(
    step: Callable[..., None], where: str, share: sweeps.Share, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepare, worked = sweeps.prepare, list[Path]()

    def fails(config: Any, until: Any) -> Any:
        if where == "prepare" and config.prune.ratio == 0.2:
            raise NumericError("it does not go")
        return prepare(config, until)

    def work(context: Any, *_: Any) -> None:
        worked.append(context.job.folder)
        if where == "work" and len(worked) == 1:
            raise NumericError("it does not go")

    monkeypatch.setattr(sweeps, "prepare", fails)
    monkeypatch.setattr(sweeps, "prune", work)
    monkeypatch.setattr(sweeps.latency, "table", work)
    monkeypatch.setattr(Trial, "score_key", property(lambda trial: trial.label))
    step(share.sweep, share, Progress(tmp_path / "sweep"))
    assert worked[-1] == share.sweep.trials[1].folder
    assert "trial prune.ratio=0.2: it does not go" in (tmp_path / "sweep" / "log.jsonl").read_text()
