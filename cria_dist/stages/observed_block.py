"""A block of the model with an observer at each of its sites, and around its layers where that is asked for.

Shapes: S sequences, T tokens, D hidden.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from cria_dist.models import depth
from cria_dist.models.blocks import Block, BlockModel
from cria_dist.models.checkpoint import Numerics, read_config
from cria_dist.models.family import family_of
from cria_dist.models.ranks import Ranks
from cria_dist.models.tensor_parallel import TensorParallelModel
from cria_dist.records import Site
from cria_dist.stages.observe import SiteObserver
from cria_dist.stages.observe_hidden import HiddenObserver
from cria_dist.stages.observer import Observer
from cria_dist.stages.sample import TokenSample
from cria_dist.store.recording import Slice


class ObservedBlock:
    """The weights of a block, on the device, under observation.

    Args:
        directory: the checkpoint.
        numerics: how it computes.
        block: the layers to load.
        ranks: the processes that share every layer.
        dtype: data type to store signals in.
        hidden: observe the hidden states around the layers too.
    """

    def __init__(
        self, directory: Path, numerics: Numerics, block: Block, ranks: Ranks, dtype: str, hidden: bool = False
    ) -> None:
        config = read_config(directory)
        family = family_of(config)
        what = directory, numerics, family, block
        self._model = BlockModel(*what) if ranks.size == 1 else TensorParallelModel(*what, ranks)
        self.block = block
        self.observers: dict[Site, Observer] = {}
        for site, width in family.widths(config).items():
            if block.first <= site.layer < block.stop:
                held, modules = ranks.units(width), family.modules(site)
                observer = SiteObserver(Slice(held.start, held.stop), width, dtype, self._model.device, ranks.whole)
                for name, module in modules.inputs.items():
                    self._model.module(module).register_forward_hook(observer.input_hook(name))
                self._model.module(modules.output).register_forward_pre_hook(observer.output_hook)
                self._model.module(f"{family.layers}.{site.layer}").register_forward_hook(observer.layer_hook)
                self.observers[site] = observer
        for site in depth.layer_sites(config)[block.first : block.stop] if hidden else ():
            width, layer = int(config["hidden_size"]), self._model.module(f"{family.layers}.{site.layer}")
            observer = HiddenObserver(Slice(0, width), width, dtype, self._model.device)
            if site.layer == 0:
                layer.register_forward_pre_hook(observer.entry_hook, with_kwargs=True)
            layer.register_forward_hook(observer.layer_hook)
            self.observers[site] = observer

    def run(
        self,
        values: torch.Tensor,
        sequences: range,
        sample: TokenSample,
        batch: int,
        finished: Callable[[Site, Observer], None],
    ) -> torch.Tensor | None:
        """Run a shard and observe it.

        Args:
            values: its tokens [S, T] or pixels [S, C, H, W], or the hidden states [S, T, D] before the block.
            sequences: numbers of its sequences.
            sample: the tokens to keep.
            batch: sequences per forward pass.
            finished: called for each site when the last batch has left its layer, the layers after it still to come.

        Returns:
            Hidden states after the block, [S, T, D] in the model's data type, on the host; None after the last block.
        """
        after: torch.Tensor | None = None
        expected = len(sample.rows(sequences))
        for observer in self.observers.values():
            observer.reset(expected)
        for start in range(0, len(sequences), batch):
            part = sequences[start : start + batch]
            rows = sample.rows(part).to(self._model.device)
            for site, observer in self.observers.items():
                is_last = part.stop == sequences.stop
                observer.begin(rows, _bound(finished, site, observer) if is_last else None)
            hidden_STD = self._model(values[start : start + len(part)])
            if not self.block.is_last:
                if after is None:
                    after = torch.empty(len(sequences), *hidden_STD.shape[1:], dtype=hidden_STD.dtype)
                after[start : start + len(part)] = hidden_STD
        return after


def _bound(finished: Callable[[Site, Observer], None], site: Site, observer: Observer) -> Callable[[], None]:
    return lambda: finished(site, observer)
