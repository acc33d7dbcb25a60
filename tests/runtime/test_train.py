"""Recovery on Ray Train: two workers that distil, each with its own teacher, equal one."""

import dataclasses
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist.config import RecoverConfig
from cria_dist.errors import WorkerError
from cria_dist.models import checkpoint
from cria_dist.runtime import train
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages import recover
from cria_dist.stages.halving import Race
from cria_dist.stages.recover import Place, RecoverTask, Teacher, read_log
from tests.runtime.listening import watched

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("session")]

CONFIG = RecoverConfig(
    steps=8,
    workers=2,
    batch_sequences=4,
    sequence_length=16,
    learning_rate=2e-3,
    checkpoint_every=3,
    distill=0.5,
    temperature=2.0,
)


def losses(path: Path) -> list[float]:
    lines = read_log(path)
    assert [line["step"] for line in lines] == list(range(1, CONFIG.steps + 1))
    return [line["loss"] for line in lines]


def test_two_distilling_workers_equal_one(pico: Path, tmp_path: Path) -> None:
    tokens_path = tmp_path / "tokens.npy"
    np.save(tokens_path, np.random.default_rng(0).integers(0, 256, (12, 32)).astype(np.int32))

    def task(name: str) -> RecoverTask:
        teacher, log_path = Teacher(pico, "float32"), tmp_path / f"{name}.jsonl"
        return RecoverTask(pico, tokens_path, tmp_path / name, log_path, CONFIG, "highest", 0, teacher)

    one, two = task("one"), task("two")
    recover.train(one, Place(), None, lambda step, write: None)
    with watched() as listening:
        RayTrainer(2, use_gpu=False)(two, "distil", tmp_path / "trainer")
    assert {address for process, address in listening if "TrainWorker" in process} == {"127.0.0.1"}
    assert losses(two.log_path) == pytest.approx(losses(one.log_path), abs=1e-4)
    assert losses(one.log_path)[-1] < losses(one.log_path)[0] - 0.1
    assert (two.target / checkpoint.WEIGHTS).stat().st_size == (one.target / checkpoint.WEIGHTS).stat().st_size


@pytest.mark.slow
@pytest.mark.soak
def test_two_that_share_a_model_stop_where_they_fall_behind_and_go_on_later(pico: Path, tmp_path: Path) -> None:
    tokens_path = tmp_path / "tokens.npy"
    np.save(tokens_path, np.random.default_rng(0).integers(0, 256, (12, 32)).astype(np.int32))
    config = CONFIG.model_copy(update={"strategy": "fsdp2", "distill": 0.0, "patience": 9})
    whole, ours = (
        RecoverTask(pico, tokens_path, tmp_path / name, tmp_path / f"{name}.jsonl", config, "highest", 0)
        for name in ("whole", "ours")
    )
    recover.train(whole, Place(), None, lambda step, write: None)
    assert Race(tmp_path / "rungs", "better", 6, 2).goes_on(6, 0.0)
    race = Race(tmp_path / "rungs", "ours", 6, 2)
    RayTrainer(2, use_gpu=False)(dataclasses.replace(ours, race=race), "stopped", tmp_path / "trainer")
    before = read_log(ours.log_path)
    assert race.stopped() == (6, before[-1]["held_out"])
    assert not ours.target.exists()
    RayTrainer(2, use_gpu=False)(ours, "stopped", tmp_path / "trainer")
    assert read_log(ours.log_path)[:6] == before, "finished steps were repeated"
    assert losses(ours.log_path) == pytest.approx(losses(whole.log_path), abs=1e-5)
    assert (ours.target / checkpoint.WEIGHTS).is_file()


def dies_twice(config: dict[str, Any]) -> None:
    """The loop of a worker that is killed after each of two checkpoints, if it is the second one."""
    report_as = train._reporter

    def reporter(place: Place) -> recover.Checkpoint:
        report = report_as(place)

        def report_and_die(step: int, write: Any) -> None:
            report(step, write)
            mark = config["task"].log_path.with_name(f"died-{step}")
            if place.rank == 1 and not mark.exists():
                mark.touch()
                known = mark.with_name("trainer") / "killed" / "checkpoint_manager_snapshot.json"
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline and not (
                    known.is_file() and re.search(rf'"step": *{step}\b', known.read_text())
                ):
                    time.sleep(0.1)  # until the controller knows of the checkpoint
                os.kill(os.getpid(), signal.SIGKILL)

        return report_and_die

    train._reporter = reporter
    train._train_worker(config)


@pytest.mark.slow
@pytest.mark.soak
def test_a_shared_model_survives_its_workers_and_goes_on_with_fewer(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once, the workers start again; killed again, they have used up their lives, and one goes on alone."""
    tokens_path = tmp_path / "tokens.npy"
    np.save(tokens_path, np.random.default_rng(0).integers(0, 256, (12, 32)).astype(np.int32))
    config = CONFIG.model_copy(update={"strategy": "fsdp2", "distill_hidden": 0.5, "train": "all"})
    tasks = [
        RecoverTask(
            pico,
            tokens_path,
            tmp_path / name,
            tmp_path / f"{name}.jsonl",
            config,
            "highest",
            0,
            Teacher(pico, "float32"),
        )
        for name in ("quiet", "killed")
    ]
    recover.train(tasks[0], Place(), None, lambda step, write: None)
    storage = tmp_path / "trainer"
    with monkeypatch.context() as changed:
        changed.setattr(train, "_train_worker", dies_twice)
        changed.setattr(train, "MAX_WORKER_FAILURES", 1)
        with pytest.raises(WorkerError):
            RayTrainer(2, use_gpu=False)(tasks[1], "killed", storage)
    assert {path.name for path in tmp_path.glob("died-*")} == {"died-3", "died-6"}
    before = read_log(tasks[1].log_path)
    assert len(before) == 6
    assert not [path for path in storage.rglob("*") if path.suffix in (".pkl", ".pt", ".metadata")]
    RayTrainer(1, use_gpu=False)(tasks[1], "killed", storage)
    assert read_log(tasks[1].log_path)[:6] == before, "it began where the others were"
    assert losses(tasks[1].log_path) == pytest.approx(losses(tasks[0].log_path), abs=1e-4)
    one, other = (checkpoint.load_model(task.target, checkpoint.Numerics()).state_dict() for task in tasks)
    assert all(np.allclose(one[name], other[name], atol=1e-3) for name in one)
