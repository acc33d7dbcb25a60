"""Tensors that stay in their files until one is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from cria_dist.models.checkpoint import opened


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of some safetensors files by name: a 70B model's repaired maps are 30 GB together, 0.4 each.

    Args:
        paths: the files, no two with a tensor of the same name.

    Raises:
        ConfigError: a file is damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        for path in paths:
            with opened(path) as handle:
                self._files |= dict.fromkeys(handle.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        with opened(self._files[name]) as handle:
            return handle.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; none is read for it."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """The names, file by file."""
        return iter(self._files)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._files)
