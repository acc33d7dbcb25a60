"""The seam for methods whose units are single weights: they become zero where they are, and no shape changes.

Shapes: O outputs, I inputs of a linear map.
"""

from typing import ClassVar

from cria_dist.methods.base import MethodBase, Statistic
from cria_dist.records import Float64


class WeightMethod(MethodBase):
    """A method that sets single weights of the MLP's linear maps to zero, map by map; attention is left alone."""

    unit: ClassVar[str] = "weight"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Only the weights."""
        return frozenset({"weights"})

    def sparsify(self, weight_OI: Float64, zeros: int, seed: int) -> Float64:
        """The map with ``zeros`` of its weights zero (more only if it had more).

        Args:
            weight_OI: weights of the map, float64.
            zeros: how many become zero.
            seed: for methods that draw numbers; differs per map.

        Raises:
            NumericError: the weights are not finite.
        """
        raise TypeError(f"{type(self).__name__} must define sparsify")
