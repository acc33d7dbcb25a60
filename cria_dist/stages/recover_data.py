"""What a recovery reads: the calibration text in training sequences, or examples, in an order no worker count changes.

Shapes: S sequences, T tokens.
"""

import math
from pathlib import Path

import numpy as np
import torch

from cria_dist.config import RecoverConfig
from cria_dist.stages.examples import Data, read_examples


def training_data(inputs_path: Path, labels_path: Path | None, length: int) -> Data:
    """What is trained on: calibration tokens as sequences of ``length``, or whole examples with their labels."""
    if labels_path is not None:
        return read_examples(inputs_path, labels_path)
    return training_sequences(np.load(inputs_path, allow_pickle=False), length)


def training_sequences(tokens_ST: np.ndarray, length: int) -> torch.Tensor:
    """Cut the calibration tokens into training sequences, int64 [S, length]."""
    flat = tokens_ST.reshape(-1)
    count = max(1, len(flat) // length)
    return torch.from_numpy(flat[: count * length].reshape(count, -1).astype(np.int64))


def sequence_order(available: int, config: RecoverConfig, seed: int) -> list[np.ndarray]:
    """Sequence indices of each step's global batch; a fresh permutation per epoch, the same for any worker count."""
    needed = config.steps * config.batch_sequences
    epochs = math.ceil(needed / available)
    order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(available) for epoch in range(epochs)])
    return np.split(order[:needed], config.steps)
