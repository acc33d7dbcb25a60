"""Hidden states between two blocks: one object per (layer, shard), deleted when nothing will read it any more.

They lie below the digest of the recording, so those of an interrupted run with other weights or tokens are never
taken for this one's.
Shapes: S sequences, T tokens, D hidden.
"""

import torch

from cria_dist.store import sealed
from cria_dist.store.recording import Recording

FOLDER = "boundaries"


def write(recording: Recording, layer: int, shard: int, hidden_STD: torch.Tensor) -> int:
    """Store the hidden states before ``layer`` in their data type; returns the bytes written."""
    return sealed.write(recording.storage, _name(recording, layer, shard), {"hidden": hidden_STD})


def read(recording: Recording, layer: int, shard: int) -> torch.Tensor:
    """Hidden states before ``layer``, [S, T, D].

    Raises:
        DataError: they are missing or damaged.
    """
    return sealed.read(recording.storage, _name(recording, layer, shard))["hidden"]


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
