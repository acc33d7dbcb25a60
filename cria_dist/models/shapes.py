"""Shapes and data types of a checkpoint's tensors, from the headers of its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cria_dist.models import checkpoint


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk.

    Attributes:
        shape: its sizes.
        dtype: its data type as safetensors writes it: ``F32``, ``BF16``, ``F16``.
    """

    shape: Sequence[int]
    dtype: str


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, without reading any.

    Raises:
        ConfigError: a file is damaged, or lacks a tensor that the index says it has.
    """
    found: dict[str, Stored] = {}
    for file, names in checkpoint.weight_files(directory).items():
        with checkpoint.opened(directory / file) as handle:
            for name in names:
                part = handle.get_slice(name)
                found[name] = Stored(tuple(part.get_shape()), part.get_dtype())
    return found
