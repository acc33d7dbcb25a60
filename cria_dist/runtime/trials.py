"""The trials of a sweep on Ray Tune.

Tune keeps pickles in its folder. They are read again when a sweep goes on, so the folder is made for this user alone
and one that others could have written to is refused.
"""

import math
import os
import secrets
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from cria_dist import files, locks
from cria_dist.errors import ConfigError, CriaError
from cria_dist.pipeline import Context
from cria_dist.pipeline.scoring import prune_and_score
from cria_dist.report.progress import Bar, Progress
from cria_dist.runtime.experiments import Experiment, experiments
from cria_dist.stages.follow import followed
from cria_dist.stages.sweep import Sweep, Trial
from cria_dist.stages.sweep_table import loss

LOST_TRIAL_RETRIES = 3
TRIAL_RESOURCES = {"memory": float(1 << 20)}
"""A trial's own process waits for its workers and takes no CPU; Tune wants it to ask for something."""
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean in a run
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints tables at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folder has everything
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it ends quietly, as if all trials were done
}
LOOK_SECONDS = 1.0

MakeContext = Callable[[Trial], Context]


@dataclass(frozen=True, slots=True)
class Tried:
    """What was tried.

    Attributes:
        trials: those that ended well, each once, in the order of the grid; what searches chose is ordered by label.
        failures: reasons of the others, by label.
    """

    trials: tuple[Trial, ...]
    failures: Mapping[str, str]


def carry_out(sweep: Sweep, make_context: MakeContext, progress: Progress) -> Tried:
    """Prune, recover and score every trial, as many at a time as the sweep says.

    Args:
        sweep: the trials.
        make_context: gives a trial its surroundings, in a process of its own.
        progress: of the sweep.

    Raises:
        ConfigError: others can write to Tune's folder.
    """
    os.environ.update(ENVIRONMENT)
    outcomes = sweep.folder / "trials"
    tried: dict[Path, Trial] = {}
    failures: dict[str, str] = {}
    with progress.stage("trials", total=sweep.count, unit="trials") as bar, _following(outcomes, bar):
        for experiment in experiments(sweep):
            for config, reason in _results(sweep, experiment, make_context):
                trial = experiment.trial(config)
                if reason:
                    failures[trial.label] = " ".join(str(reason).split())
                else:
                    tried[trial.folder] = trial  # a search may choose the same again
    # Tune tells them in another order when a sweep goes on
    found = [trial for trial in sweep.trials if trial.folder in tried]
    if sweep.searches:
        found = sorted(tried.values(), key=lambda trial: trial.label)
    return Tried(tuple(found), failures)


def _results(
    sweep: Sweep, experiment: Experiment, make_context: MakeContext
) -> Generator[tuple[Mapping[str, Any], object]]:
    """What Tune chose, and why it failed if it did.

    To Tune a trial with an error of ours is over; one that failed when the sweep was carried out before is tried again
    here.
    """
    outcomes, chosen, attempt = sweep.folder / "trials", experiment.trial, secrets.token_hex(8)

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        return _run(chosen(config), make_context, outcomes, attempt)

    for one in _tuner(sweep, experiment, tune.with_resources(trial, TRIAL_RESOURCES)).fit():
        config, outcome = one.config or {}, one.metrics or {}
        if one.error is None and "error" in outcome and outcome.get("attempt") != attempt:
            outcome = trial(config)
        yield config, one.error or outcome.get("error")


def _run(trial: Trial, make_context: MakeContext, outcomes: Path, attempt: str) -> dict[str, Any]:
    """One trial in its process. An error of ours would come again, so Tune is not to try again."""
    path = outcomes / f"{trial.folder.name}.json"
    # a search may choose a trial twice
    with locks.in_turn(path.with_suffix(".lock")):
        if path.is_file() and "error" not in (there := files.read_json(path)):
            return there  # done, but the driver died before Tune wrote that down, or chosen again by a search
        return _try(trial, make_context, path, attempt)


def _try(trial: Trial, make_context: MakeContext, path: Path, attempt: str) -> dict[str, Any]:
    try:
        with locks.alone(trial.folder):
            context = make_context(trial)
            evaluations = prune_and_score(context)
            context.pool.release()
        outcome: dict[str, Any] = {"loss": loss(evaluations[-1]), "parameters": evaluations[-1].parameters}
    except CriaError as error:
        outcome = {"error": str(error), "attempt": attempt}
    files.write_json(path, outcome)
    return {"loss": math.nan, **outcome}


def _tuner(sweep: Sweep, experiment: Experiment, trainable: Any) -> tune.Tuner:
    """A new one, or the one that was interrupted, which keeps its concurrency: another one is a new one.

    A new one finds what is finished, too: in ``trials``.
    """
    folder = sweep.folder / f"{experiment.name}-{sweep.concurrency}"
    if tune.Tuner.can_restore(str(folder)):
        _check_private(folder)
        return tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, restart_errored=True)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return tune.Tuner(
        trainable,
        param_space=dict(experiment.space),
        tune_config=tune.TuneConfig(max_concurrent_trials=sweep.concurrency, reuse_actors=True, **experiment.settings),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(sweep.folder),
            failure_config=tune.FailureConfig(max_failures=LOST_TRIAL_RETRIES),
            verbose=0,
        ),
    )


def _check_private(folder: Path) -> None:
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"{folder} holds pickles and is not this user's alone; delete it and run the same command again "
            "(finished runs are kept)"
        )


def _following(outcomes: Path, bar: Bar) -> AbstractContextManager[None]:
    """Count the trials that have an outcome until the block ends."""

    def look() -> None:
        there = len(list(outcomes.glob("*.json")))
        if there > bar.done:
            bar.advance(there - bar.done)

    return followed(look, LOOK_SECONDS, "follow-trials")
