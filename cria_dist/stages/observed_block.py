"""A block of the model with an observer at each of its sites, and around its layers where that is asked for.

Shapes: S sequences, T tokens, D hidden.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cria_dist.models import depth, experts
from cria_dist.models.blocks import Block, BlockModel
from cria_dist.models.checkpoint import Numerics, read_config
from cria_dist.models.family import family_of
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.models.ranks import Ranks
from cria_dist.models.tensor_parallel import TensorParallelModel
from cria_dist.records import Site
from cria_dist.stages.observe import SiteObserver
from cria_dist.stages.observe_experts import ExpertsObserver
from cria_dist.stages.observe_hidden import HiddenObserver
from cria_dist.stages.observer import Observer
from cria_dist.stages.sample import Sample
from cria_dist.store.recording import Slice


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is observed.

    Attributes:
        dtype: data type to store signals in.
        parts: parts of a layer.
        hidden: the hidden states around the layers too.
    """

    dtype: str
    parts: tuple[str, ...] = ("mlp",)
    hidden: bool = False


class ObservedBlock:
    """The weights of a block, on the device, under observation.

    Args:
        directory: the checkpoint.
        numerics: how it computes.
        block: the layers to load.
        ranks: the processes that share every layer.
        wanted: what is observed.
    """

    def __init__(self, directory: Path, numerics: Numerics, block: Block, ranks: Ranks, wanted: Wanted) -> None:
        config, dtype = read_config(directory), wanted.dtype
        family = family_of(config)
        self._rows_at = functools.partial(_rows_at, family, config)
        what = directory, numerics, family, block
        self._model = BlockModel(*what) if ranks.size == 1 else TensorParallelModel(*what, ranks)
        self.block = block
        self.observers: dict[Site, Observer] = {}
        for site, units in family.widths(config, wanted.parts).items():
            if block.first <= site.layer < block.stop:
                width, modules = units * family.span(site, config), family.modules(site)
                held = ranks.units(width)
                kind = ExpertsObserver if site.part == experts.PART else SiteObserver
                observer = kind(Slice(held.start, held.stop), width, dtype, self._model.device, ranks.whole)
                stack = family.stack(site, config)
                for name in modules.recorded:
                    hook = observer.input_hook(*family.signal_names(site, name), stack=stack, units=units)
                    self._model.module(modules.seen_at(name)).register_forward_hook(hook)
                output = self._model.module(modules.output)
                if modules.leaves:
                    output.register_forward_hook(observer.left_hook)
                else:
                    output.register_forward_pre_hook(observer.output_hook)
                self._model.module(f"{family.layers}.{site.layer}").register_forward_hook(observer.layer_hook)
                self.observers[site] = observer
        for site in depth.layer_sites(config)[block.first : block.stop] if wanted.hidden else ():
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
        sample: Sample,
        batch: int,
        finished: Callable[[Site, Observer], None],
    ) -> torch.Tensor | None:
        """Run a shard and observe it.

        Args:
            values: its tokens [S, T] or pixels [S, C, H, W], or the hidden states [S, T, D] before the block.
            sequences: numbers of its sequences.
            sample: the tokens to keep, and which sequences can go through the model together.
            batch: sequences per forward pass.
            finished: called for each site when the last batch has left its layer, the layers after it still to come.

        Returns:
            Hidden states after the block, [S, T, D] in the model's data type, on the host; None after the last block.
        """
        after: torch.Tensor | None = None
        expected = sample.sampled(sequences)
        for observer in self.observers.values():
            observer.reset(expected)
        left = len(sequences)
        for part in sample.batches(sequences, batch):
            rows, inputs = part.rows.to(self._model.device), part.of(values)
            left -= len(inputs)
            for site, observer in self.observers.items():
                observer.begin(self._rows_at(site, rows), None if left else _bound(finished, site, observer))
            hidden_STD = self._model(inputs)
            if not self.block.is_last:
                if after is None:  # the first batch has the longest sequences
                    after = torch.zeros(len(sequences), *hidden_STD.shape[1:], dtype=hidden_STD.dtype)
                part.put(after, hidden_STD)
        return after


def _rows_at(family: MlpFamily, config: ModelDict, site: Site, rows: torch.Tensor) -> torch.Tensor:
    return family.rows_at(site, config, rows)


def _bound(finished: Callable[[Site, Observer], None], site: Site, observer: Observer) -> Callable[[], None]:
    return lambda: finished(site, observer)
