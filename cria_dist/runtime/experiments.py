"""What Ray Tune is asked to try: every trial of a grid, or what Optuna chooses next.

Each search has an experiment of its own, and so compares only trials of its own combination of the grid.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from cria_dist.config.sweep import Choice, Range
from cria_dist.stages.sweep import Search, Sweep
from cria_dist.stages.trial import Trial

RANDOM_SHARE = 4
"""One in so many trials of a search is drawn at random, before the others."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment of Tune.

    Attributes:
        name: of its folder.
        trial: makes a trial of what Tune chose; of a search, a ConfigError where its values do not go together.
        label: names it, also then.
        space: what it chooses from.
        settings: how, as arguments of ``TuneConfig``.
    """

    name: str
    trial: Callable[[Mapping[str, Any]], Trial]
    label: Callable[[Mapping[str, Any]], str]
    space: Mapping[str, Any]
    settings: Mapping[str, Any]


def experiments(sweep: Sweep) -> Iterator[Experiment]:
    """All of a sweep, in turn."""

    def trial(config: Mapping[str, Any]) -> Trial:
        return sweep.trials[config["number"]]

    if not sweep.searches:
        numbers = tune.grid_search(list(range(len(sweep.trials))))
        yield Experiment("tune", trial, lambda config: trial(config).label, {"number": numbers}, {})
    for number, search in enumerate(sweep.searches):
        yield _searching(f"tune-{number:02d}", search, sweep.base.seed)


def _searching(name: str, search: Search, seed: int) -> Experiment:
    import optuna  # not with the package unless asked for
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(1, search.count // RANDOM_SHARE))
    settings = {
        "search_alg": OptunaSearch(sampler=sampler),
        "num_samples": search.count,
        "metric": "loss",
        "mode": "min",
    }

    def values(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: _value(choice, config[key]) for key, choice in search.choices.items()}

    return Experiment(
        name,
        lambda config: search.trial(values(config)),
        lambda config: search.label(values(config)),
        {key: _domain(choice) for key, choice in search.choices.items()},
        settings,
    )


def _domain(choice: Choice) -> Any:
    """As Tune says it; of a list the number of a value, for values may be tables."""
    if not isinstance(choice, Range):
        return tune.choice(list(range(len(choice))))
    low, high = choice.min, choice.max
    if isinstance(low, int) and isinstance(high, int):
        return (tune.lograndint if choice.log else tune.randint)(low, high + 1)
    return (tune.loguniform if choice.log else tune.uniform)(low, high)


def _value(choice: Choice, chosen: Any) -> Any:
    """The value that was chosen, as plain data."""
    if not isinstance(choice, Range):
        return choice[chosen]
    return int(chosen) if isinstance(choice.min, int) and isinstance(choice.max, int) else float(chosen)
