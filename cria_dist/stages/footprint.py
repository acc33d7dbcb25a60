"""Memory of one worker, by arithmetic: what it holds while it records a block of layers.

Shapes: B sequences of a batch, S of a shard, T tokens of a sequence, D hidden, N units of a layer, V sampled tokens.
The figures are peaks of what PyTorch allocates (tests hold them against measured memory); a process itself
(interpreter, libraries, 0.3-0.6 GB of main memory) comes on top.
"""

import math
from dataclasses import dataclass

import torch

from cria_dist.config import RunConfig
from cria_dist.models.blocks import Block
from cria_dist.models.family import family_of
from cria_dist.models.mlp import ModelDict
from cria_dist.models.sizes import Sizes, sizes_of

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one worker.

    Attributes:
        weights: of the block's layers, and the embedding if it is the first block.
        moments: float32 Gram matrices and sums of every site.
        data: sampled signals of a shard, hidden states, activations of a batch, files being written.
    """

    weights: int
    moments: int
    data: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.moments + self.data

    def __str__(self) -> str:
        """As in messages."""
        return (
            f"{in_units(self.weights)} of weights + {in_units(self.moments)} of moments + {in_units(self.data)} "
            "for a batch"
        )


class Workload:
    """A model and how it is recorded, in numbers.

    Args:
        config: the run.
        model_config: config.json of the model recorded.
    """

    def __init__(self, config: RunConfig, model_config: ModelDict) -> None:
        self.model_config = model_config
        family = family_of(model_config)
        self.parts = config.prune.parts
        self.sizes: Sizes = sizes_of(model_config, family, self.parts)
        self.itemsize = itemsize(config.model.dtype)
        self.length = family.positions(model_config, config.data.sequence_length)
        self.input_shape = family.input_shape(model_config, config.data.sequence_length)
        self.signals = family.signals()
        self.shard = min(shard_sequences(config), config.data.calibration_sequences)
        self.batch = min(config.record.batch_sequences, self.shard)
        self.sampled = math.ceil(config.record.tokens * self.shard / config.data.calibration_sequences)
        self.signal_dtype = signal_dtype(config)
        self.records_hidden = config.records_hidden

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.sizes.layers)

    def footprint(self, block: Block, ranks: int = 1) -> Footprint:
        """Memory of a worker that records a block.

        Args:
            block: its layers.
            ranks: workers that share every layer (embedding, head and hidden states are not shared).
        """
        sizes, layers = self.sizes, slice(block.first, block.stop)
        widths = sizes.widths[layers]
        weights = sum(sizes.layers[layers]) // ranks + sizes.shared + (sizes.embedding if block.is_first else 0)
        if ranks > 1:
            weights += sizes.head
        moments = sum(width * width + width for width in widths) * 4 // ranks
        signal = self.signals * self.sampled * itemsize(self.signal_dtype)
        # one site is written beside the computation: the columns and the file, the moments as a file, twice
        writing = (2 * signal * max(widths) + 2 * 4 * max(widths) ** 2) // ranks
        data = signal * sum(widths) // ranks + writing + self._hidden_states(block) + self._around_layers(block)
        return Footprint(weights * self.itemsize, moments, data + self._activations(max(widths), ranks))

    def _activations(self, width: int, ranks: int) -> int:
        """Temporaries of one layer on one batch: the larger of attention and MLP, and the hidden states around."""
        sizes, tokens = self.sizes, self.batch * self.length
        hidden = tokens * sizes.hidden * (4 * self.itemsize + 8)  # norms compute in float32
        heads = 5 * sizes.heads + 2 * sizes.kv_heads  # turned queries, keys and values for every head, output
        scores = self.length * (sizes.heads * (4 + 2 * self.itemsize) if sizes.stores_attention else 1)
        attention = tokens * (heads * sizes.head_dim * self.itemsize + scores) // ranks
        gathered = 4 * width if self.itemsize < 4 or ranks > 1 else 0  # products are summed in float32
        mlp = tokens * (4 * width * self.itemsize // ranks + gathered)
        return hidden + max(attention, mlp)

    def _around_layers(self, block: Block) -> int:
        """Sampled hidden states of a shard: those after every layer, and those before the first."""
        states = (block.stop - block.first + block.is_first) * self.records_hidden
        return states * self.sampled * self.sizes.hidden * itemsize(self.signal_dtype)

    def _hidden_states(self, block: Block) -> int:
        """Of a shard: those before the block (or pixels), and those after it as tensor, file and file with its seal."""
        state = self.shard * self.length * self.sizes.hidden * self.itemsize
        pixels = self.shard * math.prod(self.input_shape) * 4 if len(self.input_shape) > 1 else 0
        return (pixels if block.is_first else state) + 3 * state * (not (block.is_first and block.is_last))


def shard_sequences(config: RunConfig) -> int:
    """Sequences per shard; unless set, a 16th of the calibration set and at least 8.

    Moments are stored per shard and site, a little more than N * N * 2 bytes each (half of a symmetric matrix),
    whatever the shard's length: a set of any size has at most 16 of them. The number of workers must not matter, or
    results would depend on it.
    """
    return config.record.shard_sequences or max(8, math.ceil(config.data.calibration_sequences / 16))


def num_shards(config: RunConfig) -> int:
    """Shards of the calibration set."""
    return math.ceil(config.data.calibration_sequences / shard_sequences(config))


def signal_dtype(config: RunConfig) -> str:
    """Data type recorded signals are stored in."""
    return config.model.dtype if config.record.dtype == "auto" else config.record.dtype


def itemsize(dtype: str) -> int:
    """Bytes per number."""
    return getattr(torch, dtype.removeprefix("torch.")).itemsize


def in_units(size: float) -> str:
    """A number of bytes with a decimal unit, three digits: ``13.5 GB``."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), UNITS[-1])
    return f"{size / unit:.3g} {name}"
