"""The seam for methods whose units are whole layers: a layer is judged beside the others, so all are seen at once.

Shapes: T sampled tokens of one sequence, D hidden, L layers.
"""

from collections.abc import Sequence
from typing import ClassVar

from cria_dist.arrays import Array
from cria_dist.maths.importance import lowest
from cria_dist.methods.base import MethodBase, Statistic, Verdict
from cria_dist.records import Float64


class LayerMethod(MethodBase):
    """A method that removes layers: sums over calibration sequences, which workers take in parts, then one verdict."""

    unit: ClassVar[str] = "layer"

    @property
    def needs(self) -> frozenset[Statistic]:
        """The hidden states around every layer."""
        return frozenset({"hidden"})

    @property
    def fewest_tokens(self) -> int:
        """Sampled tokens a sequence must have for :meth:`measure`."""
        return 1

    @property
    def held_out_share(self) -> float:
        """Share of the calibration sequences, at their end, that :meth:`measure` does not see."""
        return 0.0

    @property
    def tolerance(self) -> float | None:
        """Relative increase of the perplexity up to which removals are accepted; None where the budget decides."""
        return None

    def measure(self, states: Sequence[Array]) -> Float64:
        """What one sequence says; the sums of all sequences are added up.

        Args:
            states: the hidden states that enter the first layer and those that leave each layer, L + 1 of [T, D].
        """
        raise TypeError(f"{type(self).__name__} must define measure")

    def judge(self, total: Float64) -> Verdict:
        """Scores of the layers, [L], from the sums over all sequences.

        Raises:
            NumericError: the sums do not define scores.
        """
        raise TypeError(f"{type(self).__name__} must define judge")

    def removed(self, total: Float64, count: int) -> tuple[int, ...]:
        """The ``count`` layers that go, sorted."""
        return tuple(lowest(self.judge(total).keep_N, count).tolist())

    def attempts(self, total: Float64, most: int) -> tuple[tuple[int, ...], ...]:
        """Removals to try, in this order, none of more than ``most`` layers; asked for where there is a tolerance."""
        raise TypeError(f"{type(self).__name__} must define attempts if it has a tolerance")
