"""What a search chooses: values as the run wants them, better ones the more it knows, one study for every point."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from cria_dist.runtime.experiments import Experiment, experiments
from cria_dist.stages.sweep import Sweep, Trial, plan

SWEEP = """
model = { path = "builtin:smollm2-135m" }
seed = 3
[sweep]
search = "optuna"
trials = 24
[sweep.grid]
prune.ratio = [0.2, 0.3]
[sweep.space]
recover.learning_rate = { min = 1e-6, max = 1e-2, log = true }
recover.temperature = { min = 1.0, max = 4.0 }
recover.lora_rank = { min = 1, max = 3 }
method = [{ name = "wanda" }, { name = "random" }]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return plan(str(path))


def loss(trial: Trial) -> float:
    """Least at a learning rate of 1e-4 with the second method."""
    recover = trial.config.recover
    return (math.log10(recover.learning_rate) + 4) ** 2 + (trial.config.method.name == "wanda")


def search(experiment: Experiment) -> list[Trial]:
    """What Tune does with it, one trial after another."""
    searcher: Any = experiment.settings["search_alg"]
    searcher.set_search_properties("loss", "min", dict(experiment.space))
    trials: list[Trial] = []
    for number in range(experiment.settings["num_samples"]):
        trials.append(experiment.trial(searcher.suggest(str(number))))
        searcher.on_trial_complete(str(number), {"loss": loss(trials[-1])})
    return trials


def test_every_point_of_the_grid_is_searched_by_itself(sweep: Sweep) -> None:
    found = [search(experiment) for experiment in experiments(sweep)]
    assert [experiment.name for experiment in experiments(sweep)] == ["tune-00", "tune-01"]
    assert [{trial.config.prune.ratio for trial in trials} for trials in found] == [{0.2}, {0.3}]
    for trials in found:
        recovers = [trial.config.recover for trial in trials]
        assert all(1e-6 <= one.learning_rate <= 1e-2 and 1 <= one.temperature <= 4 for one in recovers)
        assert {one.lora_rank for one in recovers} == {1, 2, 3}
        losses = [loss(trial) for trial in trials]
        assert sum(losses[12:]) < 0.6 * sum(losses[:12]), "it learns from what it knows"
        assert min(losses) < 0.1


def test_the_same_seed_searches_the_same(sweep: Sweep) -> None:
    once, again = (search(next(experiments(sweep))) for _ in range(2))
    assert [trial.folder for trial in once] == [trial.folder for trial in again]


def test_a_grid_is_tried_whole(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'model = { path = "builtin:smollm2-135m" }\n[sweep.grid]\nprune.ratio = [0.2, 0.3]\nseed = [1, 2]\n'
    )
    sweep = plan(str(path))
    [experiment] = experiments(sweep)
    numbers = experiment.space["number"]["grid_search"]
    assert [experiment.trial({"number": number}) for number in numbers] == list(sweep.trials)
    found = [(trial.config.prune.ratio, trial.config.seed) for trial in sweep.trials]
    assert found == list(itertools.product((0.2, 0.3), (1, 2)))
