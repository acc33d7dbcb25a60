"""Recoveries that are compared while they train: who stops, what a stopped one leaves, what is never compared."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.maths import halving
from cria_dist.stages import recover
from cria_dist.stages.halving import Race, contest
from cria_dist.stages.recover import Place, RecoverTask, read_log

CONFIG = RecoverConfig(
    steps=9, batch_sequences=4, sequence_length=16, learning_rate=2e-3, checkpoint_every=2, distill=0, patience=9
)


def test_rungs_are_powers_of_the_factor_away() -> None:
    found = [halving.rung(step, grace=5, factor=3) for step in (4, 5, 14, 15, 44, 45)]
    assert found == [None, 5, 5, 15, 15, 45]
    assert halving.rung(10**9, 1, 10) == 10**9


def test_behind_is_not_among_the_best_share() -> None:
    assert not halving.is_behind(9.0, [], 3)
    assert not halving.is_behind(1.0, [1.0], 3)
    assert halving.is_behind(1.1, [1.0], 3)
    assert [halving.is_behind(loss, [1.0, 2.0, 3.0, 4.0], 2) for loss in (2.4, 2.6)] == [False, True]
    assert [halving.is_behind(loss, [1.0, 2.0, 3.0, 4.0], 3) for loss in (1.9, 2.1)] == [False, True]
    assert halving.is_behind(float("nan"), [1.0], 2)
    assert not halving.is_behind(9.0, [float("nan")], 2)


def race(folder: Path, name: str = "ours") -> Race:
    return Race(folder, name, 2, 2)


def test_a_decision_stands(tmp_path: Path) -> None:
    first, second = race(tmp_path, "first"), race(tmp_path, "second")
    assert first.goes_on(1, 9.0), "below the first rung nobody is compared"
    assert first.goes_on(2, 3.0)
    assert not second.goes_on(3, 3.5)
    assert not second.goes_on(3, 0.1), "asked again, after a worker died"
    assert first.goes_on(3, 99.0), "the same rung"
    assert second.state(9) == "stopped after 3 of 9 steps, held-out loss 3.5000"
    assert first.state(9) is None
    assert race(tmp_path / "other", "third").goes_on(3, 99.0), "another race"


def test_what_was_trained_before_counts_and_the_last_look_stops_nobody(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 1.0, "held_out": float(step)} for step in (2, 4, 9)]
    first, second = race(tmp_path, "first"), race(tmp_path, "second")
    first.follow([{"step": 1, "loss": 5.0}, *log], steps=9)
    assert sorted(path.parent.name for path in tmp_path.rglob("first.json")) == ["2", "4"]
    assert second.goes_on(2, 1.5)
    assert not second.goes_on(4, 4.5)


@pytest.fixture(scope="module")
def make_task(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RecoverTask]:
    folder = tmp_path_factory.mktemp("race")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 256, (12, 32)).astype(np.int32))
    return lambda name: RecoverTask(
        pico, folder / "tokens.npy", folder / name, folder / f"{name}.jsonl", CONFIG, "highest", 0
    )


def test_one_that_falls_behind_stops_and_goes_on_as_if_it_had_not(
    make_task: Callable[[str], RecoverTask], tmp_path: Path
) -> None:
    whole, ours = make_task("whole"), make_task("ours")
    recover.train(whole, Place(), None, lambda step, write: None)
    assert race(tmp_path, "better").goes_on(4, 0.0)
    saved: list[int] = []

    def save(step: int, write: Callable[[Path], None]) -> None:
        saved.append(step)
        write(tmp_path)

    recover.train(replace(ours, race=race(tmp_path)), Place(), None, save)
    assert saved == [2, 4]
    assert not ours.target.exists()
    stop = race(tmp_path).stopped()
    before = read_log(ours.log_path)
    assert stop == (4, before[-1]["held_out"])
    assert len(before) == 4
    recover.train(ours, Place(), tmp_path, lambda step, write: None)
    assert read_log(ours.log_path)[:4] == before
    assert [(line["loss"], line.get("held_out")) for line in read_log(ours.log_path)] == [
        (line["loss"], line.get("held_out")) for line in read_log(whole.log_path)
    ]
    mine, theirs = (load_file(task.target / "model.safetensors") for task in (ours, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_is_compared_agrees_in_budget_text_and_schedule(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def key(**changes: Any) -> str:
        return contest(run_config(tmp_path, **changes))

    same: list[dict[str, Any]] = [
        {},
        {"recover": {"learning_rate": 1e-5, "distill": 0.1, "train": "all", "patience": 3}},
        {"method": {"name": "random"}, "seed": 3},
        {"prune": {"allocation": "global", "repair": "bias"}},
    ]
    assert len({key(**one) for one in same}) == 1
    different: list[dict[str, Any]] = [
        {},
        {"prune": {"ratio": 0.5}},
        {"prune": {"budget": "parameters"}},
        {"prune": {"units": ["attention"]}, "method": {"name": "magnitude"}},
        {"recover": {"steps": 7}},
        {"recover": {"sequence_length": 8}},
        {"method": {"name": "block_influence"}},
        {"data": {"calibration_sequences": 8}},
    ]
    keys = [key(**one) for one in different]
    assert all(one != other for one, other in itertools.combinations(keys, 2))
