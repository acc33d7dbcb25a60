"""One step of a recovery: gradients do not depend on the number of workers, and are clipped; the learning rate."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from cria_dist.config import RecoverConfig
from cria_dist.models import checkpoint
from cria_dist.stages import recover_step
from cria_dist.stages.recover_state import TrainState
from cria_dist.stages.recover_step import Place, learning_rate, optimise

CONFIG = RecoverConfig(workers=1)


@pytest.fixture
def batch_ST() -> torch.Tensor:
    """5 sequences of 16 tokens."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 16)))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_mean_of_the_workers_gradients_is_that_of_the_global_batch(
    world: int, batch_ST: torch.Tensor, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over micro-batches: 4, 2 or 1 sequences per worker, at most 2 at a time."""
    monkeypatch.setattr(recover_step, "CLIP_NORM", 1e9)  # clipping comes after the mean
    batch_ST = batch_ST[:4]

    def gradients(part_ST: torch.Tensor) -> dict[str, torch.Tensor]:
        model = checkpoint.load_model(pico, checkpoint.Numerics())
        optimise(model, TrainState(model, CONFIG), part_ST, 1e-3, Place())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = checkpoint.load_model(pico, checkpoint.Numerics())
    model(input_ids=batch_ST, labels=batch_ST).loss.backward()  # the whole batch at once, by transformers' own loss
    parts = [gradients(batch_ST[rank::world]) for rank in range(world)]
    for name, parameter in model.named_parameters():
        mean = sum(part[name] for part in parts) / world
        assert torch.allclose(mean, parameter.grad, rtol=1e-4, atol=1e-6), name


def test_the_logged_loss_is_that_of_the_whole_part(batch_ST: torch.Tensor, pico: Path) -> None:
    model = checkpoint.load_model(pico, checkpoint.Numerics())
    with torch.no_grad():
        expected = float(model(input_ids=batch_ST, labels=batch_ST).loss)
    found = optimise(model, TrainState(model, CONFIG), batch_ST, 1e-3, Place())
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradients_are_clipped(batch_ST: torch.Tensor, pico: Path) -> None:
    model = checkpoint.load_model(pico, checkpoint.Numerics())
    optimise(model, TrainState(model, CONFIG), batch_ST, 0.0, Place())
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) <= recover_step.CLIP_NORM * 1.001


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    config = RecoverConfig(steps=100, learning_rate=1e-3)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1e-3 * 0.55)
    assert 1e-4 < rates[-1] < 1.1e-4


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_learning_rate_of_a_short_training_is_never_zero(steps: int) -> None:
    config = RecoverConfig(steps=steps, learning_rate=1e-3)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert max(rates) == pytest.approx(1e-3)
    assert min(rates) >= 1e-4
