"""Hidden states between two blocks: one object per (layer, shard), deleted when nothing will read it any more.

They lie below the digest of the recording, so those of an interrupted run with other weights or tokens are never
taken for this one's. A file is safetensors followed by its SHA-256: a flipped bit must not become a result.
Shapes: S sequences, T tokens, D hidden.
"""

import hashlib

import torch
from safetensors.torch import load, save

from cria_dist.errors import DataError
from cria_dist.store.recording import Recording

FOLDER = "boundaries"
SEAL_BYTES = hashlib.sha256().digest_size


def write(recording: Recording, layer: int, shard: int, hidden_STD: torch.Tensor) -> int:
    """Store the hidden states before ``layer`` in their data type; returns the bytes written."""
    content = save({"hidden": hidden_STD})
    content += hashlib.sha256(content).digest()
    recording.storage.write(_name(recording, layer, shard), content)
    return len(content)


def read(recording: Recording, layer: int, shard: int) -> torch.Tensor:
    """Hidden states before ``layer``, [S, T, D].

    Raises:
        DataError: they are missing or damaged.
    """
    name = _name(recording, layer, shard)
    sealed = recording.storage.read(name)
    content, seal = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:]
    if hashlib.sha256(content).digest() != seal:
        raise DataError(
            f"{recording.storage.where(name)} is damaged (sha256 differs); delete it and run the same command again"
        )
    return load(content)["hidden"]


def delete(recording: Recording, layer: int, shard: int) -> None:
    """Remove the hidden states before ``layer``."""
    recording.storage.delete(_name(recording, layer, shard))


def delete_all(recording: Recording) -> None:
    """Remove what interrupted runs left, those with other weights or tokens too."""
    for name in recording.storage.sizes(FOLDER):
        recording.storage.delete(name)


def stored(recording: Recording) -> set[tuple[int, int]]:
    """The (layer, shard) pairs whose hidden states are there."""
    names = [name.split("/")[-2:] for name in recording.storage.sizes(_folder(recording))]
    return {(int(layer.removeprefix("layer-")), _shard(file)) for layer, file in names}


def _folder(recording: Recording) -> str:
    return f"{FOLDER}/{recording.digest[:16]}"


def _name(recording: Recording, layer: int, shard: int) -> str:
    return f"{_folder(recording)}/layer-{layer:03d}/shard-{shard:05d}.safetensors"


def _shard(file: str) -> int:
    return int(file.removeprefix("shard-").removesuffix(".safetensors"))
