"""When a recovery stops: the loss on sequences it does not train on, and the best weights so far."""

import torch
from transformers import PreTrainedModel

from cria_dist.stages.examples import Data
from cria_dist.stages.halving import Race
from cria_dist.stages.recover_loss import mean_loss
from cria_dist.stages.recover_shards import is_shared
from cria_dist.stages.recover_state import TrainState
from cria_dist.stages.recover_step import Place, mean_over_workers, micro_batches

HELD_OUT = 10
"""One in so many training sequences is held out: the last ones."""


def split(data: Data, patience: int) -> tuple[Data, Data | None]:
    """What is trained on, and what is held out where a recovery may stop early."""
    if not patience:
        return data, None
    count = max(1, len(data) // HELD_OUT)
    return data[: len(data) - count], data[len(data) - count :]


def held_out_loss(model: PreTrainedModel, held: Data, place: Place, most_together: int) -> float:
    """Mean cross entropy over the held-out sequences, each worker on its part of them, at most so many together."""
    most, mine = (
        [part for like in micro_batches(held[rank :: place.world]) for part in like.split(most_together)]
        for rank in (0, place.rank)
    )
    with torch.no_grad():
        for _ in range(len(most) - len(mine) if is_shared(model) else 0):
            mean_loss(model, held[:1])  # the first worker has more, and all gather parameters together
        total = sum(float(mean_loss(model, part)) * len(part) for part in mine)
    return mean_over_workers(total * place.world / len(held), place)


def falls_behind(race: Race | None, step: int, loss: float, place: Place) -> bool:
    """Whether others of a sweep were so much better after as many steps that this recovery stops; all workers agree."""
    if race is None:
        return False
    stops = place.rank == 0 and not race.goes_on(step, loss)
    return mean_over_workers(float(stops), place) > 0


def is_over(state: TrainState, loss: float, patience: int) -> bool:
    """Remember the weights if none were better; whether the loss has not fallen for ``patience`` looks."""
    if state.best is None or loss < state.best_loss:
        state.remember(loss)
        return False
    state.waited += 1
    return state.waited >= patience
