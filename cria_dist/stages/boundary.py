"""Hidden states between two blocks: one object per (layer, shard), deleted when nothing will read it any more.

They lie below the digest of the recording, so those of an interrupted run with other weights or tokens are never
taken for this one's; and below its owner, for each of the runs that share a recording deletes its own.
Shapes: S sequences, T tokens, D hidden.
"""

import torch

from cria_dist.stages.sample import Batch
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
    """Remove what interrupted runs left, those with other weights or tokens too; nothing of another owner's."""
    for name in recording.storage.sizes(_owned(recording)):
        recording.storage.delete(name)


def is_stored(recording: Recording, layer: int, shard: int) -> bool:
    """Whether the hidden states before ``layer`` are there."""
    name = _name(recording, layer, shard)
    return name in recording.storage.sizes(name.rpartition("/")[0])


def stored(recording: Recording) -> set[tuple[int, int]]:
    """The (layer, shard) pairs whose hidden states are there."""
    names = [name.split("/")[-2:] for name in recording.storage.sizes(_folder(recording))]
    return {(int(layer.removeprefix("layer-")), _shard(file)) for layer, file in names}


class Behind:
    """Hidden states behind a layer, put together from batches.

    Args:
        sequences: how many of them.
    """

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._values: torch.Tensor | None = None

    def put(self, part: Batch, hidden: torch.Tensor) -> None:
        """Add a batch."""
        if self._values is None:  # the first batch has the longest sequences
            self._values = torch.zeros(self._sequences, *hidden.shape[1:], dtype=hidden.dtype)
        part.put(self._values, hidden.cpu())

    def write(self, recording: Recording, layer: int, shard: int) -> None:
        """Store them as those before ``layer``."""
        if self._values is not None:
            write(recording, layer, shard, self._values)


def _folder(recording: Recording) -> str:
    return f"{_owned(recording)}/{recording.digest[:16]}"


def _owned(recording: Recording) -> str:
    return f"{FOLDER}/{recording.owner}" if recording.owner else FOLDER


def _name(recording: Recording, layer: int, shard: int) -> str:
    return f"{_folder(recording)}/layer-{layer:03d}/shard-{shard:05d}.safetensors"


def _shard(file: str) -> int:
    return int(file.removeprefix("shard-").removesuffix(".safetensors"))
