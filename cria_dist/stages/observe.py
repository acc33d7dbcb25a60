"""Observe one site while a model runs: sampled signals and running moments, on the model's device.

Every token that comes by counts: calibration sequences are cut from a stream and never padded.
Shapes: S sequences, T tokens, D hidden, N units of the site, U units of it that this process holds, R sampled tokens.
"""

from collections.abc import Callable

import numpy as np
import torch

from cria_dist.errors import NumericError
from cria_dist.records import Site
from cria_dist.stages.gram import gram_of
from cria_dist.store.activations import tile_bounds
from cria_dist.store.recording import Slice


class SiteObserver:
    """Collects the signals of one site over one shard.

    Args:
        units: those this process holds.
        width: units of the site.
        dtype: data type to store signals in.
        device: where the model computes.
        gather: the signal [T, N] of all processes that share the site, from the [T, U] of each.
    """

    def __init__(
        self,
        units: Slice,
        width: int,
        dtype: str,
        device: torch.device,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.units = units
        self.width = width
        self.count = 0
        self.total_U = torch.zeros(units.stop - units.start, dtype=torch.float32, device=device)
        self._broken = torch.zeros((), dtype=torch.int64, device=device)
        self._gram = gram_of(units, width, device)
        self._gather = gather
        self._dtype = getattr(torch, dtype)
        # tiles, kept from shard to shard: fresh pages cost as much as the copy
        self._signals: dict[str, list[torch.Tensor]] = {}
        self._expected = 0
        self._rows = torch.empty(0, dtype=torch.int64, device=device)
        self._at = slice(0, 0)
        self._finished: Callable[[], None] | None = None

    def reset(self, expected: int) -> None:
        """Forget the last shard; ``expected`` sampled tokens are to come."""
        self.count = 0
        self.total_U.zero_()
        self._broken.zero_()
        self._gram.clear()
        self._expected = expected
        self._at = slice(0, 0)
        self._finished = None

    def begin(self, rows: torch.Tensor, finished: Callable[[], None] | None = None) -> None:
        """Get ready for a batch.

        Args:
            rows: indices of the batch's sampled tokens, on the device.
            finished: called once, when the shard's last batch has left the layer.
        """
        self._rows = rows
        self._at = slice(self._at.stop, self._at.stop + len(rows))
        self._finished = finished

    def input_hook(self, name: str) -> Callable[..., None]:
        """Hook for a linear map whose output is a pre-activation signal."""

        def hook(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> None:
            self._keep(name, output.reshape(-1, len(self.total_U)))

        return hook

    def output_hook(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook for the linear map that reads the post-activation signal."""
        signal_TU = args[0].reshape(-1, len(self.total_U))
        self._keep("output", signal_TU)
        self.count += len(signal_TU)
        self.total_U += signal_TU.sum(dim=0, dtype=torch.float32)
        self._gram.add(self._gather(signal_TU))

    def layer_hook(self, _module: torch.nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor]) -> None:
        """Hook for the layer: tokens whose hidden state it leaves NaN or infinite (one sum per token shows it)."""
        hidden_STD = output[0] if isinstance(output, tuple) else output
        self._broken += (~torch.isfinite(hidden_STD.sum(dim=-1, dtype=torch.float32))).sum()
        if self._finished is not None:
            finished, self._finished = self._finished, None
            finished()

    def signals(self) -> dict[str, list[np.ndarray]]:
        """Tiles of the sampled signals in the words of the storage, [R, n] each; valid until the next shard."""
        return {name: [self._words(tile_RU) for tile_RU in tiles] for name, tiles in self._signals.items()}

    def moments(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Tokens, their sum [U] and the sum of their products with all units [U, N], float32."""
        return self.count, self.total_U.cpu().numpy(), self._gram.rows()

    def check(self, site: Site, shard: int) -> None:
        """Refuse NaN and infinity in hidden states, in moments (both of all tokens) and in what is stored (overflow).

        Raises:
            NumericError: names site, shard and how many values.
        """
        where, remedy = f"{site.key}, shard {shard}", "does the model overflow in this model.dtype?"
        if tokens := int(self._broken):
            raise NumericError(
                f"{where}: hidden states of {tokens} tokens are NaN or infinite after the layer; {remedy}"
            )
        broken = _broken(self.total_U) + _broken(self._gram.diagonal())
        if broken:
            raise NumericError(f"{where}: {broken} moments are NaN or infinite; {remedy}")
        for name, tiles in self._signals.items():
            if overflown := sum(_broken(tile_RU[: self._expected]) for tile_RU in tiles):
                raise NumericError(
                    f"{where}: {overflown} values of signal {name!r} do not fit {self._dtype}; "
                    "set record.dtype=bfloat16 or float32"
                )

    def _keep(self, name: str, signal_TU: torch.Tensor) -> None:
        bounds = tile_bounds(len(self.total_U))
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

    def _words(self, tile_RU: torch.Tensor) -> np.ndarray:
        kept = tile_RU[: self._expected]
        return (kept.view(torch.uint16) if self._dtype is torch.bfloat16 else kept).cpu().numpy()


def _broken(values: torch.Tensor) -> int:
    """How many values are NaN or infinite; if there are none, one pass over them shows it."""
    return 0 if bool(torch.isfinite(values.sum(dtype=torch.float32))) else int((~torch.isfinite(values)).sum())
