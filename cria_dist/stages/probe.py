"""How fast this machine records: by products of matrices, or by really recording a part of the model."""

import contextlib
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block
from cria_dist.models.channels import ConvFamily
from cria_dist.models.device import own_device
from cria_dist.models.family import family_of
from cria_dist.stages import boundary
from cria_dist.stages.footprint import Workload
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

BATCH_TOKENS = 4096
"""Longest batch of a probe, unless one sequence is longer."""
REPEATS = 3
MATRIX = 1024


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer.

    Attributes:
        token: to run a token through the layer, sums of products included.
        shard: to write a shard's moments and signals, beyond its tokens.
        load: to read the layer's weights.
    """

    token: float
    shard: float
    load: float


def time_layer(config: RunConfig, work: Workload, directory: Path, layer: int) -> LayerTime:
    """Record random tokens with one layer of the model, in this process, as one worker would.

    One batch and two batches are timed in turn, the fastest of three each; their difference is what a batch takes.
    """
    sequences = min(work.batch, max(1, BATCH_TOKENS // work.length))
    root = Path(config.run.root)
    with tempfile.TemporaryDirectory(dir=root if root.is_dir() else None) as folder, _as_a_worker():
        task = _task(config, work, directory, Path(folder), sequences)
        recorder = Recorder(task)
        block = Block(layer, layer + 1, work.layers)
        first = _seconds(recorder, task, work, ShardWork(1, block))
        pairs = [[_seconds(recorder, task, work, ShardWork(shard, block)) for shard in (1, 0)] for _ in range(REPEATS)]
    one, two = (min(column) for column in zip(*pairs, strict=True))
    batch = two - one if one < two < 2 * one else two / 2  # writing takes no less than nothing
    return LayerTime(batch / (sequences * work.length), max(0.0, one - batch), max(0.0, first - one))


def flop_per_second(dtype: str) -> float:
    """Of square matrix products in this process, as one worker would compute them: what no layer exceeds by much."""
    device = own_device()
    matrix = torch.ones(MATRIX, MATRIX, dtype=getattr(torch, dtype), device=device)
    seconds = float("inf")
    with _as_a_worker():
        for _ in range(REPEATS):
            started = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            seconds = min(seconds, time.perf_counter() - started)
    return 2 * MATRIX**3 / seconds


def _task(config: RunConfig, work: Workload, directory: Path, folder: Path, sequences: int) -> RecordTask:
    """Three batches: shard 0 has two of them, shard 1 one."""
    random, shape = np.random.default_rng(0), (3 * sequences, *work.input_shape)
    vocabulary = work.sizes.vocabulary
    inputs = random.integers(0, vocabulary, shape, np.int32) if vocabulary else random.random(shape, np.float32)
    np.save(folder / "tokens.npy", inputs)
    sampled = config.record.tokens * 3 * sequences // config.data.calibration_sequences
    return RecordTask(
        recording=Recording(LocalStorage(folder / "recording"), "probe"),
        model_dir=directory,
        tokens_path=folder / "tokens.npy",
        numerics=checkpoint.Numerics(config.model.dtype, config.model.matmul),
        signal_dtype=work.signal_dtype,
        shard_sequences=2 * sequences,
        batch_sequences=sequences,
        sampled_tokens=max(1, sampled),
        seed=config.seed,
    )


def _seconds(recorder: Recorder, task: RecordTask, work: Workload, item: ShardWork) -> float:
    if not item.block.is_first:
        sequences = task.shard_sequences // (1 + item.shard)
        hidden_STD = torch.randn(
            sequences, *_state_shape(work, item.block.first), dtype=getattr(torch, task.numerics.dtype)
        )
        boundary.write(task.recording, item.block.first, item.shard, hidden_STD)
    started = time.perf_counter()
    recorder(item)
    return time.perf_counter() - started


def _state_shape(work: Workload, layer: int) -> tuple[int, ...]:
    """Positions and width of the hidden states before a layer; those of convolutional nets differ."""
    family = family_of(work.model_config)
    if not isinstance(family, ConvFamily):
        return work.length, work.sizes.hidden
    model, seen = checkpoint.empty_model(work.model_config), list[torch.Size]()
    model.get_submodule(f"{family.layers}.{layer}").register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].shape)
    )
    model(pixel_values=torch.empty(1, *work.input_shape, device="meta"))
    return tuple(seen[0][1:])


@contextlib.contextmanager
def _as_a_worker() -> Generator[None]:
    """One thread, as every worker on a CPU has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
