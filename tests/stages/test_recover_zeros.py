"""Weights that are zero stay zero through training, also when it is resumed; the others learn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.config import RecoverConfig
from cria_dist.models import checkpoint
from cria_dist.stages import recover
from cria_dist.stages.recover import Place, RecoverTask
from cria_dist.stages.sparsify import sparse_names

CONFIG = RecoverConfig(
    steps=4, workers=1, batch_sequences=4, sequence_length=16, learning_rate=2e-3, checkpoint_every=2, distill=0
)


@pytest.fixture
def task(make_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> RecoverTask:
    model = make_model(tmp_path / "model")
    tensors = load_file(model / checkpoint.WEIGHTS)
    for name in sparse_names(model):
        tensors[name][tensors[name].abs() < 0.1] = 0.0
    save_file(tensors, model / checkpoint.WEIGHTS, metadata={"format": "pt"})
    tokens = checkpoint.load_tokenizer(model)(text_file.read_text(), verbose=False)["input_ids"]
    np.save(tmp_path / "tokens.npy", np.asarray(tokens[: 12 * 32], dtype=np.int32).reshape(12, 32))
    held = tuple(sorted(sparse_names(model)))
    target, log = tmp_path / "recovered", tmp_path / "log" / "loss.jsonl"
    return RecoverTask(model, tmp_path / "tokens.npy", target, log, CONFIG, "highest", seed=0, held=held)


def zeros(directory: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / checkpoint.WEIGHTS)
    return {name: tensors[name] == 0 for name in names}


def test_zeros_stay_and_the_others_learn(task: RecoverTask) -> None:
    recover.train(task, Place(), None, lambda step, write: None)
    before, after = zeros(task.model_dir, task.held), zeros(task.target, task.held)
    old, new = (load_file(folder / checkpoint.WEIGHTS) for folder in (task.model_dir, task.target))
    for name in task.held:
        assert 100 < int(before[name].sum()) < before[name].numel()
        assert after[name].equal(before[name])
        assert not new[name].equal(old[name])


def test_without_being_held_they_do_not(task: RecoverTask) -> None:
    recover.train(replace(task, held=()), Place(), None, lambda step, write: None)
    before, after = zeros(task.model_dir, task.held), zeros(task.target, task.held)
    assert all(int(after[name].sum()) < int(before[name].sum()) / 2 for name in task.held)


def test_a_resumed_recovery_holds_them_too(task: RecoverTask, tmp_path: Path) -> None:
    def save(step: int, write: Callable[[Path], None]) -> None:
        (tmp_path / "state").mkdir(exist_ok=True)
        write(tmp_path / "state")

    recover.train(task, Place(), None, save)
    whole = load_file(task.target / checkpoint.WEIGHTS)
    recover.train(task, Place(), tmp_path / "state", lambda step, write: None)
    resumed = load_file(task.target / checkpoint.WEIGHTS)
    assert all(resumed[name].equal(whole[name]) for name in whole)
    after = zeros(task.target, task.held)
    assert all(after[name].equal(place) for name, place in zeros(task.model_dir, task.held).items())
