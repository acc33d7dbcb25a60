"""What a training worker is said to hold is what it holds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.stages.estimate_left import Left
from cria_dist.stages.estimate_recover import recovery_bytes, training_workers
from cria_dist.stages.recover import RecoverTask, student
from cria_dist.stages.recover_state import TrainState

RunConfigMaker = Callable[..., RunConfig]
LAYER = 3 * 48 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32
AROUND = 300 * 32 + 32
PARAMETERS = 2 * LAYER + AROUND


def said(config: RunConfig, pico: Path) -> int:
    shape = checkpoint.read_config(pico)
    return recovery_bytes(config, shape, Left(shape, checkpoint.count_parameters(shape), {}))


def held(task: RecoverTask) -> int:
    """Bytes of weights, gradients and moments after a step; the count of steps left aside."""
    model = student(task)
    state = TrainState(model, task.config)
    model(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.square().sum().backward()
    state.optimizer.step()
    moments = [one[name] for one in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return sum(one.numel() * one.element_size() for one in (*model.parameters(), *gradients, *moments))


@pytest.mark.parametrize("recipe", [{"train": "all"}, {"train": "blocks"}, {"train": "mlp"}, {"lora_rank": 4}])
def test_what_learns_is_counted_four_times(
    recipe: dict[str, Any], task: RecoverTask, run_config: RunConfigMaker, pico: Path, tmp_path: Path
) -> None:
    if "lora_rank" in recipe:
        pytest.importorskip("peft")
    config = run_config(tmp_path, recover={"distill": 0, **recipe})
    assert said(config, pico) == held(replace(task, config=task.config.model_copy(update=recipe)))


def test_a_teacher_is_counted_where_it_lies_beside(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    alone = said(run_config(tmp_path, recover={"distill": 0}), pico)
    assert alone == 16 * (2 * LAYER + 32) + 4 * 300 * 32, "embeddings are frozen"
    assert said(run_config(tmp_path), pico) == alone + 4 * PARAMETERS
    assert said(run_config(tmp_path, model={"dtype": "bfloat16"}), pico) == alone + 2 * PARAMETERS
    assert said(run_config(tmp_path, recover={"teacher": "cpu"}), pico) == alone
    assert said(run_config(tmp_path, recover={"teacher_gpus": 1}), pico) == alone


def test_workers_share_all_but_what_is_gathered(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    """A layer with its gradient, and what lies around the layers, of both models."""
    shared = {"strategy": "fsdp2", "workers": 4}
    ray = {"pool": "ray"}
    alone = said(run_config(tmp_path), pico)
    assert said(run_config(tmp_path, recover=shared, run=ray), pico) == -(-alone // 4) + 8 * AROUND + 8 * LAYER
    assert said(run_config(tmp_path, recover=shared), pico) == alone, "in this process there is one worker"
    assert training_workers(run_config(tmp_path, recover=shared, run=ray)) == 4


def test_what_was_pruned_would_have_learned(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    config, shape = run_config(tmp_path, recover={"distill": 0}), checkpoint.read_config(pico)
    gone = recovery_bytes(config, shape, Left(shape, PARAMETERS - 100, {}))
    assert said(config, pico) - gone == 1600
