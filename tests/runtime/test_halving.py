"""Who is stopped early is whom Ray Tune's ASHAScheduler stops."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from cria_dist.stages.halving import Race

STEPS = 40


@pytest.mark.parametrize(("grace", "factor", "seed"), [(2, 2, 0), (1, 3, 1), (5, 4, 2)])
def test_the_rule_is_that_of_ray(grace: int, factor: int, seed: int, tmp_path: Path) -> None:
    """Twelve trials, eight of them at a time, in a random order of looks."""
    random = np.random.default_rng(seed)
    scheduler = ASHAScheduler("step", "loss", "min", max_t=STEPS, grace_period=grace, reduction_factor=factor)
    waiting = [str(number) for number in range(12)]
    running: dict[str, int] = {}
    trials: dict[str, Any] = {name: SimpleNamespace(trial_id=name) for name in waiting}
    stopped: list[str] = []
    while waiting or running:
        while waiting and len(running) < 8:
            running[waiting.pop()] = 0
        name = str(random.choice(sorted(running)))
        if not running[name]:
            scheduler.on_trial_add(None, trials[name])  # pyright: ignore[reportArgumentType]  (not looked at)
        running[name] += 1
        step, loss = running[name], float(random.normal(int(name), 3))
        if step == STEPS:
            del running[name]
            continue
        result = {"step": step, "loss": loss}
        theirs = scheduler.on_trial_result(None, trials[name], result)  # pyright: ignore[reportArgumentType]
        ours = Race(tmp_path, name, grace, factor).goes_on(step, loss)
        assert ours == (theirs == TrialScheduler.CONTINUE), result
        if not ours:
            stopped.append(name)
            del running[name]
    assert 3 <= len(stopped) <= 11
