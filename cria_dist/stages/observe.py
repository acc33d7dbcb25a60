"""Observe one site while a model runs: sampled signals and running moments, on the model's device.

Shapes: T tokens, N units of the site (of this process's slice), W units of the whole site.
"""

from collections.abc import Callable

import numpy as np
import torch

from cria_dist.errors import NumericError
from cria_dist.records import Site


class SiteObserver:
    """Collects the signals of one site over one shard.

    Args:
        width: units observed here.
        dtype: data type to store signals in.
        device: where the model computes.
    """

    def __init__(self, width: int, dtype: str, device: torch.device) -> None:
        self.width = width
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self.signals: dict[str, list[torch.Tensor]] = {}
        self.count = 0
        self.total_N = torch.zeros(width, dtype=torch.float32, device=device)
        self.gram_NN = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._dtype = getattr(torch, dtype)

    def reset(self) -> None:
        """Forget the last shard."""
        self.signals = {}
        self.count = 0
        self.total_N.zero_()
        self.gram_NN.zero_()

    def input_hook(self, name: str) -> Callable[..., None]:
        """Hook for a linear map whose output is a pre-activation signal."""

        def hook(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> None:
            self._keep(name, output.reshape(-1, self.width))

        return hook

    def output_hook(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook for the linear map that reads the post-activation signal."""
        signal_TN = args[0].reshape(-1, self.width)
        self._keep("output", signal_TN)
        signal_TN = signal_TN.float()
        self.count += len(signal_TN)
        self.total_N += signal_TN.sum(dim=0)
        self.gram_NN.addmm_(signal_TN.T, signal_TN)

    def stored(self, name: str) -> np.ndarray:
        """A signal in the words of the storage data type, [T, N]."""
        signal_TN = torch.cat(self.signals[name])
        return (signal_TN.view(torch.uint16) if self._dtype is torch.bfloat16 else signal_TN).cpu().numpy()

    def moments(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Tokens, their sum [N] and the sum of their products [N, N], float32."""
        return self.count, self.total_N.cpu().numpy(), self.gram_NN.cpu().numpy()

    def check(self, site: Site, shard: int) -> None:
        """Refuse NaN and infinity, in the moments (all tokens) and in what is stored (overflow).

        Raises:
            NumericError: names site, shard and how many values.
        """
        broken = int((~torch.isfinite(self.total_N)).sum()) + int((~torch.isfinite(self.gram_NN.diagonal())).sum())
        if broken:
            raise NumericError(
                f"{site.key}, shard {shard}: {broken} moments are NaN or infinite; does the model overflow in this "
                "model.dtype?"
            )
        for name, blocks in self.signals.items():
            overflown = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
            if overflown:
                raise NumericError(
                    f"{site.key}, shard {shard}: {overflown} values of signal {name!r} do not fit {self._dtype}; "
                    "set record.dtype=bfloat16 or float32"
                )

    def _keep(self, name: str, signal_TN: torch.Tensor) -> None:
        self.signals.setdefault(name, []).append(signal_TN[self.rows].to(self._dtype))
