"""Recover: a short fine-tuning of the pruned model. Plain PyTorch; who starts several workers is outside.

Its parts: ``recover_model`` (what learns), ``recover_data`` (order), ``augment`` (images), ``recover_step`` (one
optimiser step), ``recover_loss``, ``distil`` and ``distil_hidden`` (what is minimised), ``distil_teacher`` (where the
dense model lies), ``recover_watch`` (when to stop), ``recover_state`` (checkpoints), ``recover_shards`` and
``recover_slices`` (parameters shared out over the workers), ``recover_log`` (loss per step).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.errors import NumericError
from cria_dist.models import checkpoint, writing
from cria_dist.stages.augment import augmented
from cria_dist.stages.distil import objective_of
from cria_dist.stages.distil_teacher import Teacher
from cria_dist.stages.examples import Data
from cria_dist.stages.halving import Race
from cria_dist.stages.recover_data import sequence_order, training_data
from cria_dist.stages.recover_log import append_log, cut_log, following, read_log
from cria_dist.stages.recover_loss import Objective, next_token_loss
from cria_dist.stages.recover_model import Learning, merged_state, stored_names
from cria_dist.stages.recover_shards import is_shared, load_shared, write_like
from cria_dist.stages.recover_state import TrainState
from cria_dist.stages.recover_step import Place, learning_rate, optimise
from cria_dist.stages.recover_watch import falls_behind, held_out_loss, is_over, split
from cria_dist.stages.recover_zeros import hold_zeros

__all__ = ["Checkpoint", "Place", "RecoverTask", "Teacher", "following", "next_token_loss", "read_log", "train"]


@dataclass(frozen=True, slots=True)
class RecoverTask:
    """What every training worker is told.

    Attributes:
        model_dir: pruned checkpoint.
        tokens_path: calibration tokens or examples.
        target: folder for the recovered checkpoint.
        log_path: JSON line per step (step, loss, learning rate, seconds), written by rank 0.
        config: recipe.
        matmul: precision of float32 matrix products; weights and optimiser are float32.
        seed: seed of the data order.
        teacher: the dense model, loaded only where the recipe distils.
        held: tensors of the checkpoint whose zeros stay zero.
        labels_path: labels of the examples; None for a language model.
        parts: parts of a layer that lost units.
        race: where a sweep compares this recovery with others, to stop it if it falls behind.
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
    labels_path: Path | None = None
    parts: tuple[str, ...] = ("mlp",)
    race: Race | None = None


Checkpoint = Callable[[int, Callable[[Path], None]], None]
"""Called on every rank with the step and a writer, which every rank gives a folder and rank 0 fills."""


def train(task: RecoverTask, place: Place, resume: Path | None, save_checkpoint: Checkpoint) -> None:
    """Fine-tune and write the recovered checkpoint; rank 0 writes, and with ``fsdp2`` all gather what is written.

    A recovery that falls behind in its race ends with a checkpoint from which it can go on, and writes nothing else.

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
    objective = objective_of(config, task.teacher, task.matmul, task.labels_path is not None, place)
    model = student(task, place.shares(config))
    learner = Learner(model, TrainState(model, config), objective, config, place)
    start = learner.state.load(resume) if resume is not None else 0
    if place.rank == 0:
        cut_log(task.log_path, start)
    data, held = split(training_data(task.tokens_path, task.labels_path, config.sequence_length), config.patience)
    order = sequence_order(len(data), config, task.seed)
    started = time.monotonic()
    for step in range(start, config.steps):
        batch = augmented(data[order[step][place.rank :: place.world]], config, task.seed, step, place)
        found = {"loss": learner.learn(step, batch)}
        at_checkpoint = (step + 1) % config.checkpoint_every == 0
        if held is not None and (at_checkpoint or step + 1 == config.steps):
            found["held_out"] = learner.look(held)
        if place.rank == 0:
            append_log(task.log_path, step=step + 1, seconds=time.monotonic() - started, **found)
        if "held_out" in found and is_over(learner.state, found["held_out"], config.patience):
            break
        if at_checkpoint and step + 1 < config.steps:
            save_checkpoint(step + 1, lambda folder, done=step + 1: learner.state.save(folder, done, place.rank))
            if "held_out" in found and falls_behind(task.race, step + 1, found["held_out"], place):
                return
    learner.state.take_best()
    _write(task, model, place)


def _write(task: RecoverTask, model: PreTrainedModel, place: Place) -> None:
    """The recovered checkpoint, by the first worker."""
    if is_shared(model):
        write_like(task.model_dir, task.target, merged_state(model), place.rank)
    elif place.rank == 0:
        state: dict[str, Any] = {**merged_state(model)}  # tensors: nothing is shared out
        writing.write_like(task.model_dir, task.target, state)


def student(task: RecoverTask, shared: bool = False) -> PreTrainedModel:
    """The pruned model with what shall learn ready to learn, whole or shared out over the workers.

    Dropout is off, for what it draws depends on the number of workers.
    """
    numerics = checkpoint.Numerics("float32", task.matmul)
    learning = Learning(task.config, task.parts, task.seed)
    if shared:
        model = load_shared(task.model_dir, numerics, learning.prepare, task.config.dtype == "bfloat16")
    else:
        model = checkpoint.load_model(task.model_dir, numerics)
    in_memory = {on_disk: name for name, on_disk in stored_names(model).items()}
    hold_zeros(model, [in_memory[name] for name in task.held])
    if not shared:
        learning.prepare(model)
    if task.config.lora_rank:
        learning.adapt(model)
    return model


@dataclass(frozen=True, slots=True)
class Learner:
    """A model on its way.

    Attributes:
        model: what is trained.
        state: its parameters that learn, and their optimiser.
        objective: what is minimised.
        config: recipe.
        place: this worker.
    """

    model: PreTrainedModel
    state: TrainState
    objective: Objective
    config: RecoverConfig
    place: Place

    def learn(self, step: int, batch: Data) -> float:
        """One optimiser step, this worker on its part of the global batch; returns the loss of the whole batch.

        Raises:
            NumericError: the loss is not finite.
        """
        with self._precision():
            loss = optimise(self.model, self.state, batch, learning_rate(step, self.config), self.place, self.objective)
        if not math.isfinite(loss):
            raise NumericError(f"recovery: the loss is {loss} at step {step}; lower recover.learning_rate")
        return loss

    def look(self, held: Data) -> float:
        """Mean loss on what is held out, in the precision of training and as much of it at a time."""
        with self._precision():
            return held_out_loss(self.model, held, self.place, self.config.batch_sequences // self.place.world)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")
