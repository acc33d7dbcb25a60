"""Learning on Ray Train: two workers equal one; what goes wrong is the stage's."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.errors import WorkerError
from cria_dist.methods import Receding
from cria_dist.models import checkpoint
from cria_dist.records import Site
from cria_dist.runtime import train
from cria_dist.runtime.launch import train_here
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages.learn import LearnTask
from cria_dist.store.gates import Gates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("session")]

METHOD = Receding(steps=5, batch_sequences=3, sequence_length=16, learning_rate=0.2)


@pytest.fixture
def task(pico: Path, tmp_path: Path) -> LearnTask:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 256, (12, 32)).astype(np.int32))
    gates = Gates(tmp_path / "one.npz", "d1")
    return LearnTask(pico, tmp_path / "tokens.npy", gates, tmp_path / "one.jsonl", METHOD, "highest", 0)


@pytest.mark.slow
@pytest.mark.soak
def test_two_workers_equal_one(task: LearnTask, tmp_path: Path) -> None:
    train_here(task, "one", tmp_path)
    two = replace(task, gates=Gates(tmp_path / "two.npz", "d1"), log_path=tmp_path / "two.jsonl")
    RayTrainer(2, use_gpu=False)(two, "two", tmp_path / "trainer")
    for site in (Site(0), Site(1)):
        found_N = two.gates.read(site)
        assert np.abs(found_N).max() > 0.3
        np.testing.assert_allclose(found_N, task.gates.read(site), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.soak
def test_a_failure_names_the_stage(
    task: LearnTask, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "MAX_WORKER_FAILURES", 0)  # each of Ray Train's attempts takes most of a minute
    spoilt = shutil.copytree(pico, tmp_path / "spoilt")
    tensors = load_file(pico / checkpoint.WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, spoilt / checkpoint.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WorkerError, match=r"^learn: the loss of the gates is nan") as failure:
        RayTrainer(1, use_gpu=False)(replace(task, model_dir=spoilt), "spoilt", tmp_path / "trainer")
    assert failure.value.item == "learn"
