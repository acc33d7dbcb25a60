"""The trials of a sweep on Ray Tune.

Tune keeps pickles in its folder. They are read again when a sweep goes on, so the folder is made for this user alone
and one that others could have written to is never read. Nothing is lost with it: what became of a trial stands in
``trials``, as JSON.
"""

import logging
import math
import os
import platform
import secrets
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.execution import class_cache

from cria_dist import files, locks
from cria_dist.errors import ConfigError, CriaError
from cria_dist.pipeline import Context
from cria_dist.pipeline.scoring import prune_and_score
from cria_dist.report.progress import Bar, Progress
from cria_dist.runtime.experiments import Experiment, experiments
from cria_dist.stages.follow import followed
from cria_dist.stages.sweep import Sweep
from cria_dist.stages.sweep_table import loss
from cria_dist.stages.trial import Trial

log = logging.getLogger(__name__)

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

MakeContext = Callable[[Trial], AbstractContextManager[Context]]


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
    """
    _set_up_tune()
    outcomes = sweep.folder / "trials"
    tried: dict[Path, Trial] = {}
    failures: dict[str, str] = {}
    with progress.stage("trials", total=sweep.count, unit="trials") as bar, _following(outcomes, bar):
        for experiment in experiments(sweep):
            for config, reason in _results(sweep, experiment, make_context):
                if reason:
                    label = experiment.label(config)
                    failures[label] = " ".join(str(reason).split()).removeprefix(f"trial {label!r}: ")
                else:
                    trial = experiment.trial(config)
                    tried[trial.folder] = trial  # a search may choose the same again
    # Tune tells them in another order when a sweep goes on
    found = [trial for trial in sweep.trials if trial.folder in tried]
    if sweep.searches:
        found = sorted(tried.values(), key=lambda trial: trial.label)
    return Tried(tuple(found), failures)


def _set_up_tune() -> None:
    os.environ.update(ENVIRONMENT)
    # Ray 2.60 copies AWS_* of the driver into the runtime_env of a trial's process, which the dashboard shows
    secret = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(secret)


def _results(
    sweep: Sweep, experiment: Experiment, make_context: MakeContext
) -> Generator[tuple[Mapping[str, Any], object]]:
    """What Tune chose, and why it failed if it did.

    To Tune a trial with an error of ours is over; one that failed when the sweep was carried out before is tried again
    here.
    """
    outcomes, chosen, attempt = sweep.folder / "trials", experiment.trial, secrets.token_hex(8)
    here, root = Path.cwd(), sweep.base.run.root

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        try:
            _work_in(here, root)
            return _run(chosen(config), make_context, outcomes, attempt)
        except ConfigError as error:  # of a search, too: values that are valid one by one and not together
            return {"loss": math.nan, "error": str(error), "attempt": attempt}

    for one in _tuner(sweep, experiment, tune.with_resources(trial, TRIAL_RESOURCES)).fit():
        config, outcome = one.config or {}, one.metrics or {}
        if one.error is None and "error" in outcome and outcome.get("attempt") != attempt:
            outcome = trial(config)
        yield config, one.error or outcome.get("error")


def _work_in(driver: Path, root: str) -> None:
    """Let relative paths mean in a trial's process what they mean to the driver: Ray starts it where its raylet was.

    Args:
        driver: the working directory of the driver.
        root: ``run.root``; a model or a text that is not found is an error without our help.

    Raises:
        ConfigError: this node cannot go there, and the run folders are meant from there.
    """
    try:
        os.chdir(driver)
    except OSError as error:
        if not Path(root).expanduser().is_absolute():
            raise ConfigError(
                f"run.root={root!r} is meant from {driver}, where node {platform.node()} cannot go ({error.strerror}); "
                "set it to a folder that all nodes share"
            ) from error


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
        with make_context(trial) as context:
            evaluations = prune_and_score(context)
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
    if folder.exists() and not _is_private(folder):
        # some file systems know no modes, and a volume may be given its group anew with every pod that mounts it
        log.warning(
            "%s holds pickles and is not this user's alone, so it is not read: Tune begins anew, and finished trials "
            "are not repeated",
            folder,
        )
        folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=sweep.folder))
    elif tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, restart_errored=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def _is_private(folder: Path) -> bool:
    facts = folder.stat()
    return facts.st_uid == os.getuid() and not facts.st_mode & 0o077


def _following(outcomes: Path, bar: Bar) -> AbstractContextManager[None]:
    """Count the trials that have an outcome until the block ends."""

    def look() -> None:
        there = len(list(outcomes.glob("*.json")))
        if there > bar.done:
            bar.advance(there - bar.done)

    return followed(look, LOOK_SECONDS, "follow-trials")
