"""Recover: a short fine-tuning of the pruned model. Plain PyTorch; who starts several workers is outside.

Shapes: S sequences, T tokens, V vocabulary.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cria_dist import files
from cria_dist.config import RecoverConfig
from cria_dist.errors import NumericError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of

WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
MICRO_SEQUENCES = 1  # logits and activations of one sequence at a time


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
    """

    model_dir: Path
    tokens_path: Path
    target: Path
    log_path: Path
    config: RecoverConfig
    matmul: str
    seed: int


@dataclass(frozen=True, slots=True)
class Place:
    """Who this worker is among the data-parallel workers."""

    rank: int = 0
    world: int = 1


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
        NumericError: the loss is not finite.
    """
    config = task.config
    model = checkpoint.load_model(task.model_dir, checkpoint.Numerics("float32", task.matmul)).train()
    for parameter in frozen_parameters(model, config):
        parameter.requires_grad_(False)
    state = TrainState(model, config)
    start = state.load(resume) if resume is not None else 0
    if place.rank == 0:
        _cut_log(task.log_path, start)
    blocks_SD = training_sequences(np.load(task.tokens_path, allow_pickle=False), config.sequence_length)
    order = sequence_order(len(blocks_SD), config, task.seed)
    started = time.monotonic()
    for step in range(start, config.steps):
        mine = order[step][place.rank :: place.world]
        loss = optimise(model, state, blocks_SD[mine], learning_rate(step, config), place)
        if not math.isfinite(loss):
            raise NumericError(f"recovery: the loss is {loss} at step {step}; lower recover.learning_rate")
        if place.rank == 0:
            _log(task.log_path, step=step + 1, loss=loss, seconds=time.monotonic() - started)
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


def training_sequences(tokens_ST: np.ndarray, length: int) -> torch.Tensor:
    """Cut the calibration tokens into training sequences, int64 [S, length]."""
    flat = tokens_ST.reshape(-1)
    count = max(1, len(flat) // length)
    return torch.from_numpy(flat[: count * length].reshape(count, -1).astype(np.int64))


def sequence_order(available: int, config: RecoverConfig, seed: int) -> list[np.ndarray]:
    """Sequence indices of each step's global batch; a fresh permutation per epoch, the same for any worker count."""
    needed = config.steps * config.batch_sequences
    epochs = math.ceil(needed / available)
    order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(available) for epoch in range(epochs)])
    return np.split(order[:needed], config.steps)


def learning_rate(step: int, config: RecoverConfig) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak."""
    warm_up = max(1, config.steps // 10)
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, config.steps - warm_up)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class TrainState:
    """Model and AdamW moments, saved as safetensors (no pickle on shared storage)."""

    def __init__(self, model: PreTrainedModel, config: RecoverConfig) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )

    def save(self, folder: Path, step: int) -> None:
        """Write trained parameters and optimiser moments."""
        tensors: dict[str, torch.Tensor] = {"step": torch.tensor([step])}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state[parameter]
            tensors |= {
                f"parameter.{name}": parameter.detach(),
                f"first.{name}": moments["exp_avg"],
                f"second.{name}": moments["exp_avg_sq"],
            }
        save_file(tensors, folder / "state.safetensors")

    def load(self, folder: Path) -> int:
        """Restore what :meth:`save` wrote; returns the step."""
        tensors = load_file(folder / "state.safetensors")
        step = int(tensors["step"][0])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"first.{name}"].to(parameter),
                    "exp_avg_sq": tensors[f"second.{name}"].to(parameter),
                }
        return step


def optimise(model: PreTrainedModel, state: TrainState, batch_SD: torch.Tensor, rate: float, place: Place) -> float:
    """One optimiser step, this worker on its part of the global batch; returns the mean loss of the whole batch.

    Gradients accumulate over micro-batches so that the logits ([S, T, V] in float32) stay small.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part_SD in batch_SD.split(MICRO_SEQUENCES):
        loss = next_token_loss(model, part_SD) * (len(part_SD) / len(batch_SD))
        loss.backward()
        total += float(loss.detach())
    average_gradients(state.trained.values(), place)
    torch.nn.utils.clip_grad_norm_(state.trained.values(), CLIP_NORM)
    state.optimizer.step()
    return mean_over_workers(total, place)


def average_gradients(parameters: Iterable[torch.nn.Parameter], place: Place) -> None:
    """Mean of the gradients over all workers.

    ``DistributedDataParallel`` does the same with a second copy of the gradients in its buckets while they accumulate
    over micro-batches: 0.2 GiB per worker more for 63 M trained parameters.
    """
    if place.world == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= place.world


def mean_over_workers(loss: float, place: Place) -> float:
    """The loss of the global batch: every worker has the same number of sequences."""
    if place.world == 1:
        return loss
    total = torch.tensor([loss], device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(total)
    return float(total) / place.world


def next_token_loss(model: PreTrainedModel, tokens_SD: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    tokens_SD = tokens_SD.to(model.device)
    logits = model(input_ids=tokens_SD, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens_SD[:, 1:].flatten())


def write_recovered(model: PreTrainedModel, task: RecoverTask) -> None:
    """Write the fine-tuned weights in the layout, dtype and with the side files of the pruned checkpoint."""
    checkpoint.write_like(task.model_dir, task.target, model.state_dict())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps logged so far; lines that a crash tore are left out, of a step logged twice the later one counts."""
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            steps[line["step"]] = line
    return [line for _, line in sorted(steps.items())]


@contextmanager
def following(log_path: Path, advance: Callable[[int, int], None], tokens_per_step: int) -> Generator[None]:
    """Report the steps that training workers log, from a thread, until the block ends."""
    finished = threading.Event()
    seen = 0

    def follow() -> None:
        nonlocal seen
        while True:
            last = finished.wait(1.0)
            steps = len(read_log(log_path))
            if steps > seen:
                advance(steps - seen, (steps - seen) * tokens_per_step)
                seen = steps
            if last:
                return

    follower = threading.Thread(target=follow, name="follow-recovery", daemon=True)
    follower.start()
    try:
        yield
    finally:
        finished.set()
        follower.join()


def _cut_log(path: Path, steps: int) -> None:
    """Keep the lines up to the step training continues from."""
    kept = [line for line in read_log(path) if line["step"] <= steps]
    files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _log(path: Path, **record: float) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")
