"""Moments of one (site, shard) as safetensors: float32 on disk, float64 in the sum over shards, fixed order."""

import hashlib

import numpy as np
from safetensors.numpy import load, save

from cria_dist.errors import DataError


def encode(count: int, total_N: np.ndarray, gram_UN: np.ndarray) -> bytes:
    """Bytes of one file.

    Args:
        count: tokens summed over.
        total_N: sum per unit of the slice, float32.
        gram_UN: sums of products of the slice's units with all units, float32.
    """
    return save({"count": np.asarray([count], dtype=np.int64), "total": total_N, "gram": gram_UN})


def decode(content: bytes, path: str, sha256: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Inverse of :func:`encode`.

    Args:
        content: the file.
        path: its name, for messages.
        sha256: what the commit record says of it.

    Raises:
        DataError: these are not the recorded bytes.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} is not what was recorded (sha256 differs); delete it and run the same command again")
    tensors = load(content)
    return int(tensors["count"][0]), tensors["total"], tensors["gram"]
