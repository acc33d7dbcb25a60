"""What a recovery reads: the calibration text in training sequences, in an order that no worker count changes.

Shapes: S sequences, T tokens.
"""

import math

import numpy as np
import torch

from cria_dist.config import RecoverConfig


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
