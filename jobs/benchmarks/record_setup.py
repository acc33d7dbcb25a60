"""What the recording benchmarks share: random models, random tokens, a task over both, one thread."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from cria_dist.models.checkpoint import Numerics
from cria_dist.stages.record import RecordTask
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

VOCABULARY = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """A random Llama.

    Attributes:
        layers: decoder layers.
        hidden: hidden size; heads of 64.
        neurons: MLP units per layer.
    """

    layers: int
    hidden: int
    neurons: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is recorded.

    Attributes:
        shards: shards in the token file.
        sequences: sequences per shard.
        batch: sequences per forward pass.
        length: tokens per sequence.
        sampled: stored tokens per sequence.
    """

    shards: int
    sequences: int
    batch: int
    length: int
    sampled: int

    @property
    def tokens(self) -> int:
        """Tokens per shard."""
        return self.sequences * self.length


def save_model(folder: Path, shape: Shape, dtype: str = "float32") -> Path:
    """A checkpoint with random weights, made on the GPU if there is one."""
    transformers_logging.disable_progress_bar()
    heads = shape.hidden // 64
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def make_task(folder: Path, model_dir: Path, load: Load, numerics: Numerics | None = None) -> RecordTask:
    """A recording of random tokens below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    sequences = load.shards * load.sequences
    tokens_ST = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, load.length)).astype(np.int32)
    np.save(folder / "tokens.npy", tokens_ST)
    numerics = numerics or Numerics()
    return RecordTask(
        recording=Recording(LocalStorage(folder / "recording"), "benchmark"),
        model_dir=model_dir,
        tokens_path=folder / "tokens.npy",
        numerics=numerics,
        signal_dtype=numerics.dtype,
        shard_sequences=load.sequences,
        batch_sequences=load.batch,
        sampled_tokens=load.sampled * sequences,
        seed=0,
    )


@contextmanager
def one_thread() -> Generator[None]:
    """As a recorder on a CPU has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def discard(task: RecordTask) -> None:
    """Delete what was recorded; the disk is shared."""
    shutil.rmtree(task.recording.storage.where(""), ignore_errors=True)
