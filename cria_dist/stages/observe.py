"""Observe one site while a model runs: sampled signals and running moments, on the model's device.

Every token that comes by counts: calibration sequences are cut from a stream and never padded.
Shapes: S sequences, T tokens, D hidden, N signals of the site (one per unit, or several), U of them that this process
holds, R sampled tokens.
"""

from collections.abc import Callable

import torch

from cria_dist.errors import NumericError
from cria_dist.models.stacks import ONE_MAP, Stack
from cria_dist.records import Site
from cria_dist.stages.gram import gram_of
from cria_dist.stages.observer import REMEDY, Observer, Sums, broken
from cria_dist.store.recording import Slice


class SiteObserver(Observer):
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
        super().__init__(units, width, dtype, device)
        self.count = 0
        self.total_U = torch.zeros(units.stop - units.start, dtype=torch.float32, device=device)
        self._gram = gram_of(units, width, device)
        self._gather = gather

    def reset(self, expected: int) -> None:
        """Forget the last shard; ``expected`` sampled tokens are to come."""
        super().reset(expected)
        self.count = 0
        self.total_U.zero_()
        self._gram.clear()

    def input_hook(self, *names: str | None, stack: Stack = ONE_MAP, units: int = 1) -> Callable[..., None]:
        """Hook for a linear map whose output is a pre-activation signal, or several where it is several maps in one.

        A head of values is read by several query heads: its signal is repeated for each of them.

        Args:
            names: what the signals are called; None for one that is not kept.
            stack: the maps.
            units: of the site.
        """

        def hook(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> None:
            size, signals = len(self.total_U), stack.split(output.reshape(-1, output.shape[-1]), units, dim=1)
            for part, signal_TU in zip(names, signals, strict=True):
                if part is None:
                    continue
                if (times := size // signal_TU.shape[1]) > 1:
                    heads = signal_TU.unflatten(1, (units, 1, -1))
                    signal_TU = heads.expand(-1, -1, times, -1).flatten(1)
                self._keep(part, signal_TU.reshape(-1, size))

        return hook

    def output_hook(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook for the linear map that reads the post-activation signal."""
        signal_TU = args[0].reshape(-1, len(self.total_U))
        self._keep("output", signal_TU)
        self.count += len(signal_TU)
        self.total_U += signal_TU.sum(dim=0, dtype=torch.float32)
        self._gram.add(self._gather(signal_TU))

    def left_hook(self, module: torch.nn.Module, _args: object, output: torch.Tensor) -> None:
        """Hook for a module whose outputs are observed as if the next one was given them."""
        self.output_hook(module, (output,))

    def moments(self) -> Sums:
        """Tokens, their sum [U] and the sum of their products with all units [U, N], float32."""
        return self.count, self.total_U.cpu().numpy(), self._gram.rows()

    def check(self, site: Site, shard: int) -> None:
        """Refuse NaN and infinity in hidden states, in moments (both of all tokens) and in what is stored (overflow).

        Raises:
            NumericError: names site, shard and how many values.
        """
        where = f"{site.key}, shard {shard}"
        self._check_hidden(where)
        if sums := broken(self.total_U) + broken(self._gram.diagonal()):
            raise NumericError(f"{where}: {sums} moments are NaN or infinite; {REMEDY}")
        self._check_stored(where)
