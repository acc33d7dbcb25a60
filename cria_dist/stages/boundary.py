"""Hidden states between two blocks: one object per (layer, shard), deleted when nothing will read it any more."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cria_dist.errors import DataError
from cria_dist.store.recording import Recording

FOLDER = "boundaries"


def write(recording: Recording, layer: int, shard: int, hidden_STD: torch.Tensor) -> int:
    """Store the hidden states before ``layer``; returns the bytes written."""
    content = save({"hidden": hidden_STD})
    recording.storage.write(_name(layer, shard), content)
    return len(content)


def read(recording: Recording, layer: int, shard: int) -> torch.Tensor:
    """Hidden states before ``layer``, [S, T, D].

    Raises:
        DataError: they are missing or damaged.
    """
    name = _name(layer, shard)
    try:
        return load(recording.storage.read(name))["hidden"]
    except SafetensorError as error:
        raise DataError(
            f"{recording.storage.where(name)} is damaged ({error}); delete it and run the same command again"
        ) from error


def delete(recording: Recording, layer: int, shard: int) -> None:
    """Remove the hidden states before ``layer``."""
    recording.storage.delete(_name(layer, shard))


def stored(recording: Recording) -> set[tuple[int, int]]:
    """The (layer, shard) pairs whose hidden states are there."""
    names = recording.storage.sizes(FOLDER)
    return {(int(layer.removeprefix("layer-")), _shard(file)) for _, layer, file in (name.split("/") for name in names)}


def _name(layer: int, shard: int) -> str:
    return f"{FOLDER}/layer-{layer:03d}/shard-{shard:05d}.safetensors"


def _shard(file: str) -> int:
    return int(file.removeprefix("shard-").removesuffix(".safetensors"))
