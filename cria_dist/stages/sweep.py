"""A sweep as a list of trials: ordinary runs of one configuration with different overrides.

A trial is what ``cria prune CONFIG key=value ...`` does with the values the trial stands for, in the same run folder:
trials share recordings and scores as any two runs do, and a run that exists already is not computed again.
"""

import itertools
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cria_dist import config_file, files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.stages.prepare import run_folder


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep.

    Attributes:
        label: what sets it apart, ``prune.ratio=0.2 method.name=random``.
        command: the command that does the same by itself.
        config: its configuration.
    """

    label: str
    command: str
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return run_folder(self.config)

    @property
    def score_key(self) -> str:
        """Equal for trials whose recordings and scores are the same."""
        parts = self.config.result_part()
        return files.digest({name: value for name, value in parts.items() if name not in ("name", *AFTER_SCORING)})


AFTER_SCORING = ("prune", "recover", "evaluate")
"""Sections that recording and scoring do not read."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials.

    Attributes:
        base: the configuration without the grid.
        trials: one per combination, the last key of the grid changing fastest.
        concurrency: trials at the same time.
    """

    base: RunConfig
    trials: tuple[Trial, ...]
    concurrency: int

    @property
    def folder(self) -> Path:
        """Beside the run folders, named by the trials."""
        content = files.digest(*(trial.folder.name for trial in self.trials))
        return Path(self.base.run.root).absolute() / f"{self.base.name}-sweep-{content[:8]}"


def plan(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a configuration with a grid and check every trial.

    Raises:
        ConfigError: there is no grid, a combination is not a valid run, or two are the same run.
    """
    base, settings = config_file.load_with_sweep(path, overrides)
    if not settings.axes:
        raise ConfigError(
            f"{path} has no grid; add a table [sweep.grid] to it, or 'sweep.grid.prune.ratio=[0.2, 0.3]' here"
        )
    if base.run.folder is not None:
        raise ConfigError(f"run.folder={base.run.folder!r} is one folder and a sweep is many runs; set run.root")
    choices = [[config_file.as_override(key, value) for value in values] for key, values in settings.axes.items()]
    trials = tuple(_trial(path, overrides, own) for own in itertools.product(*choices))
    twice = [folder for folder, count in Counter(trial.folder for trial in trials).items() if count > 1]
    if twice:
        same = " and ".join(repr(trial.label) for trial in trials if trial.folder == twice[0])
        raise ConfigError(f"{same} are the same run; leave one out of sweep.grid")
    return Sweep(base, trials, settings.concurrency)


def _trial(path: str, overrides: Sequence[str], own: Sequence[str]) -> Trial:
    label = " ".join(own)
    try:
        config = config_file.load(path, [*overrides, *own])
    except ConfigError as error:
        raise ConfigError(f"trial {label!r}: {error}") from error
    return Trial(label, shlex.join(["cria", "prune", path, *overrides, *own]), config)
