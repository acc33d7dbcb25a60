"""Moments of one (site, shard) as safetensors: float32 on disk, float64 in the sum over shards, fixed order."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from cria_dist.errors import DataError
from cria_dist.files import write_bytes
from cria_dist.records import Moments


def write_moments(path: Path, count: int, total_N: np.ndarray, gram_NN: np.ndarray) -> dict[str, object]:
    """Write one shard's moments atomically; returns bytes and sha256 for the commit record."""
    content = save({"count": np.asarray([count], dtype=np.int64), "total": total_N, "gram": gram_NN})
    write_bytes(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_moments(paths: Sequence[tuple[Path, str]]) -> Moments:
    """Sum the moments of several shards in the order given.

    Args:
        paths: file and expected sha256 of each shard.

    Raises:
        DataError: a file is missing or does not have the recorded bytes.
    """
    merged: Moments | None = None
    for path, sha256 in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); run the same command again") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(
                f"{path} is not what was recorded (sha256 differs); delete it and run the same command again"
            )
        tensors = load(content)
        moments = Moments(
            int(tensors["count"][0]), tensors["total"].astype(np.float64), tensors["gram"].astype(np.float64)
        )
        merged = moments if merged is None else merged + moments
    if merged is None:
        raise DataError("no shard has moments; run the record stage again")
    return merged
