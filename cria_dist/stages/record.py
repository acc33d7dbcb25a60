"""Record: run calibration shards through blocks of the model, keep sampled signals and moments of every site.

One runner serves every schedule: a work item is (block of layers, shard of sequences). A block that is not the first
starts from the hidden states that the block before left in storage. Shapes: S sequences, T tokens, D hidden, N neurons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block, BlockModel
from cria_dist.models.family import family_of
from cria_dist.records import Site
from cria_dist.stages import boundary
from cria_dist.stages.observe import SiteObserver
from cria_dist.store.activations import SignalTable
from cria_dist.store.recording import Recording, Slice


@dataclass(frozen=True, slots=True)
class RecordTask:
    """What every recorder of a round is told.

    Attributes:
        recording: where to write.
        model_dir: checkpoint to observe.
        tokens_path: calibration tokens.
        numerics: how the model computes.
        signal_dtype: data type to store signals in.
        shard_sequences: sequences per shard.
        batch_sequences: sequences per forward pass.
        sampled_tokens: tokens per site to store, over all shards.
        seed: seed of the token sample.
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
    """

    tokens: int
    bytes_written: int


class Recorder:
    """Holds one block at a time; called once per work item."""

    def __init__(self, task: RecordTask) -> None:
        self._task = task
        self._tokens_ST = np.load(task.tokens_path, mmap_mode="r", allow_pickle=False)
        self._config = checkpoint.read_config(task.model_dir)
        self._family = family_of(self._config)
        self._model: BlockModel | None = None
        self._observers: dict[Site, SiteObserver] = {}

    def __call__(self, work: ShardWork) -> ShardDone:
        """Record one shard of one block and commit it.

        Raises:
            NumericError: a signal is not finite, or does not fit the storage data type.
            DataError: the checkpoint or the hidden states before the block cannot be read.
        """
        task = self._task
        model = self._with_block(work.block)
        first = work.shard * task.shard_sequences
        last = min(first + task.shard_sequences, len(self._tokens_ST))
        for observer in self._observers.values():
            observer.reset()
        before = None if work.block.is_first else boundary.read(task.recording, work.block.first, work.shard)
        after: list[torch.Tensor] = []
        for start in range(first, last, task.batch_sequences):
            stop = min(start + task.batch_sequences, last)
            rows = self._rows(start, stop)
            for observer in self._observers.values():
                observer.rows = rows
            tokens_ST = torch.from_numpy(np.array(self._tokens_ST[start:stop]))
            hidden_STD = model(tokens_ST if before is None else before[start - first : stop - first])
            if not work.block.is_last:
                after.append(hidden_STD.cpu())
        written = self._write(work, self._origin(first, last))
        if not work.block.is_last:
            written += boundary.write(task.recording, work.block.stop, work.shard, torch.cat(after))
        if not work.block.is_first:
            boundary.delete(task.recording, work.block.first, work.shard)
        return ShardDone((last - first) * self._tokens_ST.shape[1], written)

    def _with_block(self, block: Block) -> BlockModel:
        """The model with the weights of a block; those of another block are dropped first."""
        if self._model is not None and self._model.block == block:
            return self._model
        self._model, self._observers = None, {}
        model = BlockModel(self._task.model_dir, self._task.numerics, self._family, block)
        for site, width in self._family.widths(self._config).items():
            if block.first <= site.layer < block.stop:
                observer = SiteObserver(width, self._task.signal_dtype, model.device)
                modules = self._family.modules(site)
                for name, module in modules.inputs.items():
                    model.module(module).register_forward_hook(observer.input_hook(name))
                model.module(modules.output).register_forward_pre_hook(observer.output_hook)
                self._observers[site] = observer
        self._model = model
        return model

    def _sampled(self, sequence: int) -> np.ndarray:
        count, length = self._tokens_ST.shape
        return sampled_positions(self._task.seed, sequence, count, self._task.sampled_tokens, length)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Flat indices of the sampled tokens of a batch."""
        length = self._tokens_ST.shape[1]
        rows = [(sequence - start) * length + self._sampled(sequence) for sequence in range(start, stop)]
        return torch.from_numpy(np.concatenate(rows))

    def _origin(self, first: int, last: int) -> Mapping[str, np.ndarray]:
        """Sequence and position of the sampled tokens of a shard."""
        positions = [self._sampled(sequence) for sequence in range(first, last)]
        sequences = np.repeat(np.arange(first, last), [len(chosen) for chosen in positions])
        return {"sequence": sequences.astype(np.int32), "position": np.concatenate(positions).astype(np.int32)}

    def _write(self, work: ShardWork, origin: Mapping[str, np.ndarray]) -> int:
        task, recording, written = self._task, self._task.recording, 0
        for site, observer in self._observers.items():
            observer.check(site, work.shard)
            units = Slice(0, observer.width)
            signals = {name: observer.stored(name) for name in observer.signals}
            table = SignalTable(signals, origin, task.signal_dtype)
            part = {
                "start": units.start,
                "stop": units.stop,
                "signals": recording.write_signals(site, work.shard, units, table),
                "moments": recording.write_moments(site, work.shard, units, observer.moments()),
            }
            recording.commit(site, work.shard, observer.width, task.signal_dtype, [part])
            written += sum(int(part[kind]["bytes"]) for kind in ("signals", "moments"))
        return written


def sampled_positions(seed: int, sequence: int, num_sequences: int, tokens: int, length: int) -> np.ndarray:
    """Positions sampled from one sequence: stratified over sequences, the same for all sites and any worker.

    The first position is never taken: it acts as an attention sink with activations of another scale.

    Args:
        seed: seed of the run.
        sequence: index of the sequence.
        num_sequences: number of calibration sequences.
        tokens: tokens sampled over all sequences.
        length: tokens per sequence.

    Returns:
        Sorted positions; ``tokens // num_sequences`` of them, one more for the first ``tokens % num_sequences``.
    """
    quota = tokens // num_sequences + (1 if sequence < tokens % num_sequences else 0)
    generator = np.random.default_rng((seed, sequence))
    return np.sort(1 + generator.choice(length - 1, size=quota, replace=False))
