"""Record: run calibration shards through blocks of the model, keep sampled signals and moments of every site.

One runner serves every schedule: a work item is (block of layers, shard of sequences). A block that is not the first
starts from the hidden states that the block before left in storage. Shapes: S sequences (or images), T tokens,
C channels, H and W pixels, D hidden, N neurons.
"""

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cria_dist.errors import ConfigError, DataError
from cria_dist.models import checkpoint, ranks
from cria_dist.models.blocks import Block
from cria_dist.models.family import family_of
from cria_dist.stages import boundary
from cria_dist.stages.observed_block import ObservedBlock, Wanted
from cria_dist.stages.sample import sample_of
from cria_dist.stages.shard_writer import ShardWriter
from cria_dist.store.recording import Recording

log = logging.getLogger(__name__)

KINDS = ("signals", "moments")
"""What is written of a site; hidden states have no moments."""


@dataclass(frozen=True, slots=True)
class RecordTask:
    """What every recorder of a round is told.

    Attributes:
        recording: where to write.
        model_dir: checkpoint to observe.
        tokens_path: calibration tokens, int32 [S, T], or pixels, float32 [S, C, H, W].
        numerics: how the model computes.
        signal_dtype: data type to store signals in.
        shard_sequences: sequences per shard.
        batch_sequences: sequences per forward pass.
        sampled_tokens: tokens per site to store, over all shards.
        seed: seed of the token sample.
        hidden: record the hidden states around the layers too.
        parts: parts of a layer to observe.
    """

    recording: Recording
    model_dir: Path
    tokens_path: Path
    numerics: checkpoint.Numerics
    signal_dtype: str
    shard_sequences: int
    batch_sequences: int
    sampled_tokens: int
    seed: int
    hidden: bool = False
    parts: tuple[str, ...] = ("mlp",)


@dataclass(frozen=True, slots=True)
class ShardWork:
    """One work item: a shard through a block."""

    shard: int
    block: Block

    def __str__(self) -> str:
        """As in messages and logs."""
        return f"shard {self.shard}, {self.block}"


@dataclass(frozen=True, slots=True)
class ShardDone:
    """What a recorder reports of one work item.

    Attributes:
        tokens: tokens that went through the block.
        bytes_written: to storage.
        peak_gpu_bytes: most GPU memory PyTorch held in the process so far; 0 without a GPU.
    """

    tokens: int
    bytes_written: int
    peak_gpu_bytes: int = 0

    def counts(self) -> Mapping[str, float]:
        """For the monitor of the pool."""
        return {"tokens": self.tokens, "bytes_written": self.bytes_written, "peak_gpu_bytes": self.peak_gpu_bytes}


class Recorder:
    """Holds one block at a time; called once per work item.

    Args:
        task: what to record.
        size: processes that share every layer and are called with the same items (``tensor``); each writes the units
            it holds, the first one commits.
    """

    def __init__(self, task: RecordTask, size: int = 1) -> None:
        self._task = task
        self._ranks = ranks.join(size)
        if size > 1:
            weakref.finalize(self, ranks.leave)
        self._inputs = np.load(task.tokens_path, mmap_mode="r", allow_pickle=False)
        config = checkpoint.read_config(task.model_dir)
        self._sample = sample_of(family_of(config), config, self._inputs, task.sampled_tokens, task.seed)
        self._batch = task.batch_sequences
        self._observed: ObservedBlock | None = None

    def __call__(self, work: ShardWork) -> ShardDone:
        """Record one shard of one block and commit it.

        When a GPU runs out of memory, the shard is recorded again from its start with batches of half the size, and so
        are all shards after it; once. Sums are then rounded in another order, so that the last bits may differ from
        those of a recording that never ran out.

        Raises:
            ConfigError: the GPU has too little memory even so.
            NumericError: a hidden state or a signal is not finite, or does not fit the storage data type.
            DataError: the checkpoint, the tokens or the hidden states before the block cannot be read.
        """
        while True:
            try:
                return self._record(work)
            except torch.OutOfMemoryError as error:
                smaller = self._smaller_batch(work, error)
            log.warning("%s: out of GPU memory, record.batch_sequences %d -> %d", work, self._batch, smaller)
            self._batch = smaller
            torch.cuda.empty_cache()

    def _smaller_batch(self, work: ShardWork, error: torch.OutOfMemoryError) -> int:
        """Half the batch, once; ranks that share a layer cannot change it one by one."""
        if self._batch == 1 or self._batch < self._task.batch_sequences or self._ranks.size > 1:
            raise ConfigError(
                f"{work}: out of GPU memory with batches of {self._batch} (record.batch_sequences="
                f"{self._task.batch_sequences}); lower it, or set record.schedule=sweep with a lower record.memory_gb"
            ) from error
        return min(self._batch, self._task.shard_sequences, self._sample.sequences) // 2 or 1

    def _record(self, work: ShardWork) -> ShardDone:
        task, block, sequences = self._task, work.block, self._sequences(work)
        observed = self._with_block(block)
        if block.is_first:
            values = torch.from_numpy(self._inputs[sequences.start : sequences.stop].copy())
        else:
            values = boundary.read(task.recording, block.first, work.shard)
        with ShardWriter(task.recording, work.shard, self._sample.origin(sequences), task.signal_dtype) as writer:
            after = observed.run(values, sequences, self._sample, self._batch, writer.hand_over)
            written = self._commit(work, observed, writer)
        if after is not None:
            written += boundary.write(task.recording, block.stop, work.shard, after)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return ShardDone(self._sample.count(sequences), written, peak)

    def _commit(self, work: ShardWork, observed: ObservedBlock, writer: ShardWriter) -> int:
        """Commit each site once it is written, in the order of the layers; returns the bytes written."""
        written = 0
        for site, part in writer.parts():
            parts = self._ranks.collect(part)
            if parts:
                width = observed.observers[site].width
                self._task.recording.commit(site, work.shard, width, self._task.signal_dtype, parts)
            written += sum(int(part[kind]["bytes"]) for part in parts for kind in KINDS if kind in part)
        return written

    def _sequences(self, work: ShardWork) -> range:
        """The sequences of a shard.

        Raises:
            DataError: the tokens end before the shard begins.
        """
        first, count = work.shard * self._task.shard_sequences, self._sample.sequences
        if first >= count:
            raise DataError(
                f"{self._task.tokens_path} has {count} sequences, {work} begins at number {first}; "
                "the file is not the one the run was planned with: run the same command again"
            )
        return range(first, min(first + self._task.shard_sequences, count))

    def _with_block(self, block: Block) -> ObservedBlock:
        """The block under observation; the weights of another block are dropped first."""
        if self._observed is None or self._observed.block != block:
            self._observed = None
            task = self._task
            what = task.model_dir, task.numerics, block, self._ranks
            self._observed = ObservedBlock(*what, Wanted(task.signal_dtype, task.parts, task.hidden))
        return self._observed
