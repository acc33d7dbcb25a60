"""Observe the residual stream around one layer while a model runs: hidden states of the sampled tokens.

What leaves a layer is what enters the next, so it is stored once: as the layer's ``output``. The first layer has an
``input`` too. The state after the last layer is taken before the final norm, which would change lengths and angles.
Shapes: S sequences, T tokens, D hidden.
"""

from typing import Any

import torch

from cria_dist.records import Site
from cria_dist.stages.observer import Observer, left


class HiddenObserver(Observer):
    """Collects the hidden states of one layer over one shard; the units of its site are the D hidden dimensions."""

    def entry_hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the model's first layer: what enters it."""
        self._keep("input", _flat(args[0] if args else kwargs["hidden_states"]))

    def layer_hook(self, _module: torch.nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor]) -> None:
        """Hook after the layer: what leaves it."""
        self._keep("output", _flat(left(output)))
        super().layer_hook(_module, _args, output)

    def moments(self) -> None:
        """None are taken."""

    def check(self, site: Site, shard: int) -> None:
        """Refuse NaN and infinity in the hidden states of all tokens, and what overflows in storage.

        Raises:
            NumericError: names site, shard and how many values.
        """
        self._check_hidden(f"{site.key}, shard {shard}")
        self._check_stored(f"{site.key}, shard {shard}")


def _flat(hidden_STD: torch.Tensor) -> torch.Tensor:
    return hidden_STD.reshape(-1, hidden_STD.shape[-1])
