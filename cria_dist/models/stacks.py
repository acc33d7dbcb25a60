"""Linear maps that lie in one tensor, as queries, keys and values do in some families: which rows are a unit's.

Shapes: R rows of the tensor, N units, S of them kept.
"""

from dataclasses import dataclass

import numpy as np
import torch

from cria_dist.records import Float64


@dataclass(frozen=True, slots=True)
class Stack:
    """The maps in a tensor; a unit has rows in each of them, every unit as many as the others.

    Attributes:
        shares: rows of a unit in each map, in proportion.
        by_unit: the rows of a unit lie together, its own of every map; else the rows of a map do.
    """

    shares: tuple[int, ...] = (1,)
    by_unit: bool = False

    def split(self, tensor: torch.Tensor, units: int, dim: int = 0) -> list[torch.Tensor]:
        """The maps one by one, each with the rows of one unit after the other, along the dimension they lie along."""
        if self.by_unit:
            parts = Stack(self.shares).split(tensor.unflatten(dim, (units, -1)), units, dim + 1)
            return [one.flatten(dim, dim + 1) for one in parts]
        share = tensor.shape[dim] // sum(self.shares)
        return [*tensor.split([share * count for count in self.shares], dim)]

    def rows_of(self, kept_S: torch.Tensor, units: int, rows: int) -> torch.Tensor:
        """The rows of the kept units in a tensor of so many, ascending."""
        maps = self.split(torch.arange(rows), units)
        return torch.cat([one.reshape(units, -1)[kept_S].flatten() for one in maps]).sort().values

    def sums(self, values_R: torch.Tensor, units: int) -> Float64:
        """The sum of every unit's values, of one per row, [N]."""
        maps = self.split(values_R, units)
        return np.stack([one.numpy().reshape(units, -1).sum(axis=1) for one in maps]).sum(axis=0)


ONE_MAP = Stack()
"""A tensor that is one map."""
