"""Recovery on Ray Train: two workers that distil, each with its own teacher, equal one."""

from pathlib import Path

import numpy as np
import pytest

from cria_dist.config import RecoverConfig
from cria_dist.models import checkpoint
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages import recover
from cria_dist.stages.recover import Place, RecoverTask, Teacher, read_log

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
    RayTrainer(2, use_gpu=False)(two, "distil", tmp_path / "trainer")
    assert losses(two.log_path) == pytest.approx(losses(one.log_path), abs=1e-4)
    assert losses(one.log_path)[-1] < losses(one.log_path)[0] - 0.1
    assert (two.target / checkpoint.WEIGHTS).stat().st_size == (one.target / checkpoint.WEIGHTS).stat().st_size
