"""Recover: a short fine-tuning of the pruned model. Plain PyTorch; who starts several workers is outside.

Its parts: ``recover_data`` (order), ``recover_step`` (one optimiser step), ``recover_loss`` and ``distil`` (what is
minimised), ``recover_state`` (checkpoints), ``recover_log`` (loss per step).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.errors import NumericError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.stages.distil import Teacher, objective_of
from cria_dist.stages.recover_data import sequence_order, training_sequences
from cria_dist.stages.recover_log import append_log, cut_log, following, read_log
from cria_dist.stages.recover_loss import next_token_loss
from cria_dist.stages.recover_state import TrainState
from cria_dist.stages.recover_step import Place, learning_rate, optimise
from cria_dist.stages.recover_zeros import hold_zeros

__all__ = ["Checkpoint", "Place", "RecoverTask", "Teacher", "following", "next_token_loss", "read_log", "train"]


@dataclass(frozen=True, slots=True)
class RecoverTask:
    """What every training worker is told.

    Attributes:
        model_dir: pruned checkpoint.
        tokens_path: calibration tokens.
        target: folder for the recovered checkpoint.
        log_path: JSON line per step (step, loss, learning rate, seconds), written by rank 0.
        config: recipe.
        matmul: precision of float32 matrix products; weights and optimiser are float32.
        seed: seed of the data order.
        teacher: the dense model, loaded only where the recipe distils.
        held: parameters whose zeros stay zero.
    """

    model_dir: Path
    tokens_path: Path
    target: Path
    log_path: Path
    config: RecoverConfig
    matmul: str
    seed: int
    teacher: Teacher | None = None
    held: tuple[str, ...] = ()


Checkpoint = Callable[[int, Callable[[Path], None]], None]
"""Called on every rank with the step; rank 0's writer fills a folder."""


def train(task: RecoverTask, place: Place, resume: Path | None, save_checkpoint: Checkpoint) -> None:
    """Fine-tune and, on rank 0, write the recovered checkpoint.

    Args:
        task: what to train.
        place: this worker.
        resume: folder written by an earlier checkpoint, or None.
        save_checkpoint: called every ``checkpoint_every`` steps.

    Raises:
        ConfigError: the recipe distils and the task has no teacher.
        NumericError: the loss is not finite.
    """
    config = task.config
    objective = objective_of(config, task.teacher, task.matmul)
    model = checkpoint.load_model(task.model_dir, checkpoint.Numerics("float32", task.matmul)).train()
    for parameter in frozen_parameters(model, config):
        parameter.requires_grad_(False)
    hold_zeros(model, task.held)
    state = TrainState(model, config)
    start = state.load(resume) if resume is not None else 0
    if place.rank == 0:
        cut_log(task.log_path, start)
    blocks_ST = training_sequences(np.load(task.tokens_path, allow_pickle=False), config.sequence_length)
    order = sequence_order(len(blocks_ST), config, task.seed)
    started = time.monotonic()
    for step in range(start, config.steps):
        mine = order[step][place.rank :: place.world]
        loss = optimise(model, state, blocks_ST[mine], learning_rate(step, config), place, objective)
        if not math.isfinite(loss):
            raise NumericError(f"recovery: the loss is {loss} at step {step}; lower recover.learning_rate")
        if place.rank == 0:
            append_log(task.log_path, step=step + 1, loss=loss, seconds=time.monotonic() - started)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            save_checkpoint(step + 1, lambda folder, done=step + 1: state.save(folder, done))
    if place.rank == 0:
        write_recovered(model, task)


def frozen_parameters(model: PreTrainedModel, config: RecoverConfig) -> Iterator[torch.nn.Parameter]:
    """Parameters the recipe leaves alone: embeddings under ``blocks``, all that kept its shape under ``mlp``."""
    if config.train == "blocks":
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                yield from module.parameters()
    if config.train == "mlp":
        shape = model.config.to_dict()
        family = family_of(shape)
        trained = {name for site in family.widths(shape) for name in family.coupled_tensors(site, shape)}
        yield from (parameter for name, parameter in model.named_parameters() if name not in trained)


def write_recovered(model: PreTrainedModel, task: RecoverTask) -> None:
    """Write the fine-tuned weights in the layout, dtype and with the side files of the pruned checkpoint."""
    checkpoint.write_like(task.model_dir, task.target, model.state_dict())
