"""When a recovery stops: the loss on sequences it does not train on, and the best weights so far."""

import torch
from transformers import PreTrainedModel

from cria_dist.stages.examples import Data, like_examples
from cria_dist.stages.recover_loss import mean_loss
from cria_dist.stages.recover_state import TrainState
from cria_dist.stages.recover_step import MICRO_SEQUENCES, Place, mean_over_workers

HELD_OUT = 10
"""One in so many training sequences is held out: the last ones."""


def split(data: Data, patience: int) -> tuple[Data, Data | None]:
    """What is trained on, and what is held out where a recovery may stop early."""
    if not patience:
        return data, None
    count = max(1, len(data) // HELD_OUT)
    return data[: len(data) - count], data[len(data) - count :]


def held_out_loss(model: PreTrainedModel, held: Data, place: Place) -> float:
    """Mean cross entropy over the held-out sequences, each worker on its part of them."""
    mine = held[place.rank :: place.world]
    parts = mine.split(MICRO_SEQUENCES) if isinstance(mine, torch.Tensor) else like_examples(mine)
    with torch.no_grad():
        total = sum(float(mean_loss(model, part)) * len(part) for part in parts)
    return mean_over_workers(total * place.world / len(held), place)


def is_over(state: TrainState, loss: float, patience: int) -> bool:
    """Remember the weights if none were better; whether the loss has not fallen for ``patience`` looks."""
    if state.best is None or loss < state.best_loss:
        state.remember(loss)
        return False
    state.waited += 1
    return state.waited >= patience
