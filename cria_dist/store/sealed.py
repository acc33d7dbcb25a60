"""Tensors that are read once and then deleted: safetensors followed by their SHA-256.

A flipped bit must not become a result.
"""

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import load, save

from cria_dist.errors import DataError
from cria_dist.store.storage import Storage

SEAL_BYTES = hashlib.sha256().digest_size


def write(storage: Storage, name: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Store tensors in their data types; returns the bytes written."""
    content = save(dict(tensors))
    content += hashlib.sha256(content).digest()
    storage.write(name, content)
    return len(content)


def read(storage: Storage, name: str) -> dict[str, torch.Tensor]:
    """What was stored.

    Raises:
        DataError: it is missing or damaged.
    """
    sealed = storage.read(name)
    content, seal = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:]
    if hashlib.sha256(content).digest() != seal:
        raise DataError(f"{storage.where(name)} is damaged (sha256 differs); delete it and run the same command again")
    return load(content)
