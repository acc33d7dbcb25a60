"""A recovery of the pico model that takes a tenth of a second, and a process group for what wants one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group that this process alone is in."""
    import torch

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def task(pico: Path, text_file: Path, tmp_path: Path) -> Any:
    from cria_dist.config import RecoverConfig
    from cria_dist.models import checkpoint
    from cria_dist.stages.recover import RecoverTask  # torch: not before the environment is set

    tokens = checkpoint.load_tokenizer(pico)(text_file.read_text(), verbose=False)["input_ids"]
    np.save(tmp_path / "tokens.npy", np.asarray(tokens[: 12 * 32], dtype=np.int32).reshape(12, 32))
    recipe = RecoverConfig(
        steps=8, workers=1, batch_sequences=4, sequence_length=16, learning_rate=2e-3, checkpoint_every=3, distill=0
    )
    target, log = tmp_path / "recovered", tmp_path / "log" / "loss.jsonl"
    return RecoverTask(pico, tmp_path / "tokens.npy", target, log, recipe, "highest", seed=0)
