"""Tensors that are shared out over the training workers: whose rows are whose, how they are filled and gathered.

In memory the experts of a layer are one tensor, a row of it an expert; in checkpoints every map of every expert is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from cria_dist.models import checkpoint
from cria_dist.models.experts import assembled


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """A map of an expert, out of a tensor that is shared out.

    Attributes:
        experts: the tensor in memory, a row per expert.
        expert: number of the row.
        number: which of the row's maps, that lie one below the other.
        count: how many they are.
    """

    experts: DTensor
    expert: int
    number: int
    count: int

    @property
    def shape(self) -> torch.Size:
        """Of the map."""
        return torch.Size((self.experts.shape[1] // self.count, *self.experts.shape[2:]))

    def gathered(self) -> torch.Tensor:
        """The map; the worker who has it gives it to all, and all call this."""
        mine = self.experts.to_local()
        owner, row = divmod(self.expert, _rows_each(self.experts))
        if owner == self.experts.device_mesh.get_local_rank():
            values = mine[row].chunk(self.count)[self.number].contiguous()
        else:
            values = mine.new_empty(self.shape)
        torch.distributed.broadcast(values, owner)
        return values


Part = torch.Tensor | ExpertMap
"""What a checkpoint has as one tensor."""


def expert_maps(pieces: Sequence[Sequence[str]], experts: DTensor) -> Mapping[str, ExpertMap]:
    """What a checkpoint has in place of the experts of a layer, by its names for them."""
    return {
        name: ExpertMap(experts, expert, number, len(names))
        for expert, names in enumerate(pieces)
        for number, name in enumerate(names)
    }


def fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Give a tensor its values, of which this worker may need a slice only (``values`` may be a view of a file)."""
    mine, rows = _own(target)
    mine.copy_(values[rows])


def fill_experts(target: torch.Tensor, pieces: Sequence[Sequence[str]], directory: Path) -> None:
    """Read the experts of a layer from a checkpoint, this worker its own ones only."""
    mine, rows = _own(target)
    if pieces[rows]:
        with checkpoint.open_tensors(directory) as tensors:
            mine.copy_(assembled(pieces[rows], tensors.read))


def add(target: torch.Tensor, values: torch.Tensor) -> None:
    """Add to a tensor, of which this worker may have a slice only."""
    mine, rows = _own(target)
    mine += values[rows]


def is_gathered(part: Part) -> bool:
    """Whether all workers are needed to have it whole."""
    return isinstance(part, DTensor | ExpertMap)


def whole(part: Part) -> torch.Tensor:
    """A tensor in main memory; one that is shared out is gathered, and all workers call this."""
    if isinstance(part, ExpertMap):
        return part.gathered().cpu()
    tensor = part.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _own(tensor: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """What this worker has of a tensor, and which rows of the whole they are."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    start = tensor.device_mesh.get_local_rank() * _rows_each(tensor)
    return tensor.to_local(), slice(start, start + _rows_each(tensor))


def _rows_each(tensor: DTensor) -> int:
    """Rows of a worker; the last workers may have fewer, or none."""
    return -(-tensor.shape[0] // tensor.device_mesh.size())
