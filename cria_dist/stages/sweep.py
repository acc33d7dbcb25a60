"""A sweep as trials, a list or those a search chooses: ordinary runs of one configuration with different overrides.

A trial is what ``cria prune CONFIG key=value ...`` does with the values the trial stands for, in the same run folder:
trials share recordings and scores as any two runs do, and a run that exists already is not computed again.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cria_dist import config_file, files
from cria_dist.config import RunConfig
from cria_dist.config.sweep import Choice, Range, SweepConfig
from cria_dist.errors import ConfigError
from cria_dist.stages import halving
from cria_dist.stages.halving import Race
from cria_dist.stages.trial import Base, Trial

TIMED = ("prune.units", "prune.multiple")
"""Keys of a space that say which times a budget of latency is counted in."""


@dataclass(frozen=True, slots=True)
class Search:
    """Trials of one combination of the grid, each chosen after others are known.

    Attributes:
        base: what all trials have in common.
        point: overrides of the combination.
        choices: what is chosen, by key.
        count: number of trials.
    """

    base: Base
    point: tuple[str, ...]
    choices: Mapping[str, Choice]
    count: int

    def trial(self, values: Mapping[str, Any]) -> Trial:
        """The trial with these values of the keys.

        Raises:
            ConfigError: it is not a valid run.
        """
        return self.base.trial(self._own(values))

    def label(self, values: Mapping[str, Any]) -> str:
        """That of :meth:`trial`, also where there is no such trial."""
        return " ".join(self._own(values))

    def _own(self, values: Mapping[str, Any]) -> list[str]:
        return [*self.point, *(config_file.as_override(key, value) for key, value in values.items())]

    @property
    def example(self) -> Trial:
        """The first value of everything."""
        return self.trial({key: _ends(choice)[0] for key, choice in self.choices.items()})

    @property
    def counts_units(self) -> bool:
        """Whether the budget is a share of whatever units there are."""
        return self.example.config.prune.budget == "units"

    def corners(self) -> list[Trial]:
        """Trials with every value of a list and both ends of a range, the other keys as in the example.

        Raises:
            ConfigError: one is not valid.
        """
        first = {key: _ends(choice)[0] for key, choice in self.choices.items()}
        return [self.trial({**first, key: value}) for key, choice in self.choices.items() for value in _ends(choice)]

    def timed(self) -> list[Trial]:
        """A trial for every table of times that one of them may read.

        Raises:
            ConfigError: they cannot be listed.
        """
        first = {key: _ends(choice)[0] for key, choice in self.choices.items()}
        read = {key: choice for key, choice in self.choices.items() if key in TIMED}
        for key, choice in read.items():
            if isinstance(choice, Range) and self.example.config.prune.budget == "latency":
                raise ConfigError(
                    f"sweep.space.{key} is a range, and prune.budget=latency needs times for each of its values, "
                    "measured before any trial starts; give a list of values"
                )
        return [
            self.trial({**first, **dict(zip(read, chosen, strict=True))})
            for chosen in itertools.product(*map(_ends, read.values()))
        ]

    @property
    def digest(self) -> str:
        """Of what is searched."""
        plain = {key: one.model_dump() if isinstance(one, Range) else one for key, one in self.choices.items()}
        return files.digest(self.example.folder.name, plain, self.count)


def _ends(choice: Choice) -> list[Any]:
    return [choice.min, choice.max] if isinstance(choice, Range) else choice


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials.

    Attributes:
        base: the configuration without the grid.
        trials: one per combination, the last key of the grid changing fastest; of a search, its example.
        concurrency: trials at the same time.
        searches: one per combination, where trials are searched for.
        rungs: grace steps and reduction factor, where trials are stopped early.
        timed: trials whose budget is time; of a search one for every table of times.
        corners: of searches, trials with each of the values there are to choose.
    """

    base: RunConfig
    trials: tuple[Trial, ...]
    concurrency: int
    searches: tuple[Search, ...] = ()
    rungs: tuple[int, int] | None = None
    timed: tuple[Trial, ...] = ()
    corners: tuple[Trial, ...] = ()

    @property
    def count(self) -> int:
        """Number of trials."""
        return sum(search.count for search in self.searches) or len(self.trials)

    @property
    def folder(self) -> Path:
        """Beside the run folders, named by the trials, or by what is searched."""
        names = [trial.folder.name for trial in self.trials]
        stopping = [] if self.rungs is None else [self.rungs]
        content = files.digest(*names, *(search.digest for search in self.searches), *stopping)
        return Path(self.base.run.root).expanduser().absolute() / f"{self.base.name}-sweep-{content[:8]}"

    def race(self, trial: Trial) -> Race | None:
        """Where a trial is compared with others while it recovers."""
        if self.rungs is None:
            return None
        return Race(self.folder / "rungs" / halving.contest(trial.config)[:8], trial.folder.name, *self.rungs)


def plan(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a configuration with a grid and check every trial.

    Raises:
        ConfigError: there is no grid, a combination is not a valid run, two are the same run, optuna is missing, or
            what is to be stopped early cannot be compared.
    """
    tree = config_file.overridden(config_file.read(path), overrides)
    base, settings = config_file.parse_with_sweep(tree)
    if not settings.axes and not settings.space:
        raise ConfigError(
            f"{path} has no grid; add a table [sweep.grid] to it, or 'sweep.grid.prune.ratio=[0.2, 0.3]' here"
        )
    if base.run.folder is not None:
        raise ConfigError(f"run.folder={base.run.folder!r} is one folder and a sweep is many runs; set run.root")
    choices = [[config_file.as_override(key, value) for value in values] for key, values in settings.axes.items()]
    points = list(itertools.product(*choices))
    common = Base(path, tuple(overrides), tree)
    searches = _searches(common, points, settings) if settings.space else ()
    corners = [trial for search in searches for trial in search.corners()]
    if of_units := [one for one in searches if "prune.units" in one.choices and one.counts_units]:
        raise ConfigError(
            f"sweep.space.prune.units with prune.ratio={of_units[0].example.config.prune.ratio:g} of the units would "
            "compare models of different sizes; set prune.budget=parameters, or put it into sweep.grid"
        )
    trials = tuple(search.example for search in searches) or tuple(common.trial(own) for own in points)
    twice = [folder for folder, count in Counter(trial.folder for trial in trials).items() if count > 1]
    if twice:
        same = " and ".join(repr(trial.label) for trial in trials if trial.folder == twice[0])
        raise ConfigError(f"{same} are the same run; leave one out of sweep.grid")
    rungs = halving.rungs(settings, [(trial.label, trial.config) for trial in corners or trials], bool(searches))
    asked = [trial for search in searches for trial in search.timed()] if searches else trials
    timed = tuple(trial for trial in asked if trial.config.prune.budget == "latency")
    return Sweep(base, trials, settings.concurrency, searches, rungs, timed, tuple(corners))


def _searches(base: Base, points: Sequence[tuple[str, ...]], settings: SweepConfig) -> tuple[Search, ...]:
    if find_spec("optuna") is None:
        raise ConfigError("sweep.search='optuna' needs optuna, which is not installed; pip install 'cria-dist[sweep]'")
    return tuple(Search(base, own, settings.choices, settings.trials) for own in points)
