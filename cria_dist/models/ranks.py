"""The processes that run every work item together, and what they tell each other.

Shapes: T tokens, N units of a site, U units of one rank.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cria_dist.errors import ConfigError

TIMEOUT = timedelta(minutes=30)
"""For every collective: so far apart may the ranks of a large model be when they have loaded it. A rank that dies is
noticed at once on CPU (gloo's sockets close) and by the pool everywhere; this is for one that hangs."""
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CRIA_MEETING")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of one worker, seen from one of them; by default there is only this one.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def units(self, width: int) -> range:
        """The units of a site that this rank holds."""
        share = width // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def whole(self, own_TU: torch.Tensor) -> torch.Tensor:
        """The signal of all units, [T, N], from the part of each rank; a collective call."""
        if self.size == 1:
            return own_TU
        tokens, units = own_TU.shape
        whole_NT = own_TU.new_empty(units * self.size, tokens)
        dist.all_gather(list(whole_NT.chunk(self.size)), own_TU.T.contiguous())
        return whole_NT.T

    def collect(self, fact: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The facts of all ranks, in order, on rank 0 once every rank has brought its own; none on the others."""
        if self.size == 1:
            return [fact]
        facts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(fact, facts)
        return facts or []


def join(size: int) -> Ranks:
    """Meet the other processes of this worker at the URL in ``CRIA_MEETING``, as one of ``WORLD_SIZE``.

    Raises:
        ConfigError: this process was not started as one of so many.
    """
    if size == 1:
        return Ranks()
    place = {name: os.environ.get(name) for name in PLACE}
    if None in place.values() or place["WORLD_SIZE"] != str(size):
        raise ConfigError(
            f"record.schedule=tensor needs {size} processes that know each other, this one knows of "
            f"{place['WORLD_SIZE'] or 'none'}; set run.pool=ray or another record.schedule"
        )
    rank = int(os.environ["RANK"])
    group: dict[str, Any] = {
        "init_method": os.environ["CRIA_MEETING"],
        "rank": rank,
        "world_size": size,
        "timeout": TIMEOUT,
    }
    if torch.cuda.is_available():
        device = _own_gpu()
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", **group, device_id=device)
    else:
        dist.init_process_group("gloo", **group)
    return Ranks(rank, size)


def leave() -> None:
    """Part from the other processes, if this one has met any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_gpu() -> torch.device:
    """This rank's GPU: number ``LOCAL_RANK`` of those it sees, or the only one it sees.

    transformers reads ``LOCAL_RANK`` too, so it is set right where every process sees its own GPU as number 0.
    """
    if torch.cuda.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
