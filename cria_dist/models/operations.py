"""What becomes of each tensor of a model that loses units: replaced, cut, rescaled, in this order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cria_dist.models.residual import Rescaling
from cria_dist.models.stacks import ONE_MAP, Stack


@dataclass(frozen=True, slots=True)
class Selection:
    """Units that stay.

    Attributes:
        kept_S: their indices, ascending.
        units: how many there are.
        stack: the maps in the tensor.
        reads: the tensor reads the units, and the repair replaces it by one that reads those kept.
    """

    kept_S: torch.Tensor
    units: int
    stack: Stack = ONE_MAP
    reads: bool = False

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """A tensor with the kept units only, which lie along ``dim``."""
        rows = self.stack.rows_of(self.kept_S, self.units, tensor.shape[dim])
        return tensor.index_select(dim, rows.to(tensor.device)).contiguous()


@dataclass(frozen=True, slots=True)
class Operations:
    """What is done with tensors, by their names in checkpoints.

    Attributes:
        selections: the kept units and the dimension they lie along, of every site a tensor belongs to.
        replacements: tensors of the repair.
        rescaled: what goes by the number of units.
    """

    selections: Mapping[str, Sequence[tuple[Selection, int]]]
    replacements: Mapping[str, torch.Tensor]
    rescaled: Mapping[str, Rescaling]

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What becomes of a tensor, which may be on the meta device."""
        replaced = name in self.replacements
        if replaced:
            tensor = self.replacements[name].to(tensor.device, tensor.dtype)
        for selection, dim in self.selections.get(name, ()):
            if not (replaced and selection.reads):
                tensor = selection.of(tensor, dim)
        return self.rescaled[name].of(tensor) if name in self.rescaled else tensor

    def touches(self, name: str) -> bool:
        """Whether anything is done with a tensor."""
        return name in self.selections or name in self.replacements or name in self.rescaled
