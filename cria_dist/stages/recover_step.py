"""One optimiser step of a recovery, the same for any number of data-parallel workers.

Shapes: S sequences, T tokens.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.models.device import own_device
from cria_dist.stages.examples import Data, like_examples
from cria_dist.stages.recover_loss import Objective, cross_entropy
from cria_dist.stages.recover_state import TrainState

CLIP_NORM = 1.0
MICRO_SEQUENCES = 1  # logits and activations of one sequence at a time


@dataclass(frozen=True, slots=True)
class Place:
    """Who this worker is among the data-parallel workers.

    Attributes:
        rank: its number.
        world: how many there are.
        spare: numbers of the GPUs it has beside the one it trains on.
    """

    rank: int = 0
    world: int = 1
    spare: tuple[int, ...] = ()

    def shares(self, config: RecoverConfig) -> bool:
        """Whether the workers share parameters out."""
        return config.strategy == "fsdp2" and self.world > 1


def learning_rate(step: int, config: RecoverConfig) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak."""
    warm_up = max(1, config.steps // 10)
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, config.steps - warm_up)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimise(
    model: PreTrainedModel,
    state: TrainState,
    batch: Data,
    rate: float,
    place: Place,
    objective: Objective = cross_entropy,
) -> float:
    """One optimiser step, this worker on its part of the global batch; returns the mean loss of the whole batch.

    Gradients accumulate over micro-batches so that the logits ([S, T, V] in float32) stay small.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in micro_batches(batch):
        total += objective(model, part, len(part) / len(batch))
    average_gradients(state.trained.values(), place)
    torch.nn.utils.clip_grad_norm_(state.trained.values(), CLIP_NORM)
    state.optimizer.step()
    return mean_over_workers(total, place)


def micro_batches(data: Data) -> list[Data]:
    """What goes through a model together: one sequence of text, or examples that are alike."""
    parts = data.split(MICRO_SEQUENCES) if isinstance(data, torch.Tensor) else like_examples(data)
    return [part for part in parts if len(part)]


def average_gradients(parameters: Iterable[torch.nn.Parameter], place: Place) -> None:
    """Mean of the gradients over all workers.

    ``DistributedDataParallel`` does the same with a second copy of the gradients in its buckets while they accumulate
    over micro-batches: 0.2 GiB per worker more for 63 M trained parameters.
    """
    if place.world == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter, DTensor):  # those it averages as it shares them out
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= place.world


def mean_over_workers(loss: float, place: Place) -> float:
    """The loss of the global batch: every worker has the same number of sequences."""
    if place.world == 1:
        return loss
    total = torch.tensor([loss], device=own_device())
    torch.distributed.all_reduce(total)
    return float(total) / place.world
