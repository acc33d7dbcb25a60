"""What every observer of a layer does: it keeps the signals of sampled tokens, and says when a shard is through.

Shapes: T tokens, U units of the site that this process holds, R sampled tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from cria_dist.errors import NumericError
from cria_dist.records import Site
from cria_dist.store.activations import tile_bounds
from cria_dist.store.recording import Slice

Sums = tuple[int, np.ndarray, np.ndarray]
"""Tokens, their sum [U] and the sum of their products with all units [U, N], float32."""
REMEDY = "does the model overflow in this model.dtype?"


class Observer(ABC):
    """Collects the signals of one site over one shard.

    Args:
        units: those this process holds.
        width: units of the site.
        dtype: data type to store signals in.
        device: where the model computes.
    """

    def __init__(self, units: Slice, width: int, dtype: str, device: torch.device) -> None:
        self.units = units
        self.width = width
        self._dtype = getattr(torch, dtype)
        # tiles, kept from shard to shard: fresh pages cost as much as the copy
        self._signals: dict[str, list[torch.Tensor]] = {}
        self._expected = 0
        self._rows = torch.empty(0, dtype=torch.int64, device=device)
        self._at = slice(0, 0)
        self._finished: Callable[[], None] | None = None
        self._broken = torch.zeros((), dtype=torch.int64, device=device)

    @abstractmethod
    def moments(self) -> Sums | None:
        """Sums over all tokens, if the observer has any."""

    @abstractmethod
    def check(self, site: Site, shard: int) -> None:
        """Refuse what is not finite.

        Raises:
            NumericError: names site, shard and how many values.
        """

    def reset(self, expected: int) -> None:
        """Forget the last shard; ``expected`` sampled tokens are to come."""
        self._expected = expected
        self._at = slice(0, 0)
        self._finished = None
        self._broken.zero_()

    def begin(self, rows: torch.Tensor, finished: Callable[[], None] | None = None) -> None:
        """Get ready for a batch.

        Args:
            rows: indices of the batch's sampled tokens, on the device.
            finished: called once, when the shard's last batch has left the layer.
        """
        self._rows = rows
        self._at = slice(self._at.stop, self._at.stop + len(rows))
        self._finished = finished

    def layer_hook(self, _module: torch.nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor]) -> None:
        """Hook for the layer: tokens whose hidden state it leaves NaN or infinite (one sum per token shows it)."""
        self._broken += (~torch.isfinite(left(output).sum(dim=-1, dtype=torch.float32))).sum()
        self._finish()

    def signals(self) -> dict[str, list[np.ndarray]]:
        """Tiles of the sampled signals in the words of the storage, [R, n] each; valid until the next shard."""
        return {name: [self._words(tile_RU) for tile_RU in tiles] for name, tiles in self._signals.items()}

    def _keep(self, name: str, signal_TU: torch.Tensor) -> None:
        bounds = tile_bounds(self.units.stop - self.units.start)
        tiles = self._signals.get(name)
        if tiles is None or len(tiles[0]) < self._expected:
            sizes = [(self._expected, stop - start) for start, stop in bounds]
            tiles = [torch.empty(size, dtype=self._dtype, device=signal_TU.device) for size in sizes]
            self._signals[name] = tiles
        for (start, stop), tile_RU in zip(bounds, tiles, strict=True):
            part_TU = signal_TU[:, start:stop]
            if signal_TU.dtype == self._dtype:
                torch.index_select(part_TU, 0, self._rows, out=tile_RU[self._at])
            else:
                tile_RU[self._at] = part_TU.index_select(0, self._rows)

    def _finish(self) -> None:
        if self._finished is not None:
            finished, self._finished = self._finished, None
            finished()

    def _check_hidden(self, where: str) -> None:
        if tokens := int(self._broken):
            raise NumericError(
                f"{where}: hidden states of {tokens} tokens are NaN or infinite after the layer; {REMEDY}"
            )

    def _check_stored(self, where: str) -> None:
        for name, tiles in self._signals.items():
            if overflown := sum(broken(tile_RU[: self._expected]) for tile_RU in tiles):
                raise NumericError(
                    f"{where}: {overflown} values of signal {name!r} do not fit {self._dtype}; "
                    "set record.dtype=bfloat16 or float32"
                )

    def _words(self, tile_RU: torch.Tensor) -> np.ndarray:
        kept = tile_RU[: self._expected]
        return (kept.view(torch.uint16) if self._dtype is torch.bfloat16 else kept).cpu().numpy()


def left(output: torch.Tensor | tuple[torch.Tensor]) -> torch.Tensor:
    """The hidden state among what a layer gives."""
    return output[0] if isinstance(output, tuple) else output


def broken(values: torch.Tensor) -> int:
    """How many values are NaN or infinite; if there are none, one pass over them shows it."""
    return 0 if bool(torch.isfinite(values.sum(dtype=torch.float32))) else int((~torch.isfinite(values)).sum())
