"""Compress: a copy of a checkpoint's weight files with the sparse tensors packed, and proof that it expands to them."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.models import checkpoint, sparse
from cria_dist.stages.sparsify import sparse_names


@dataclass(frozen=True, slots=True)
class Copy:
    """A checkpoint and where its compressed weights go.

    Attributes:
        source: checkpoint with zeros in the MLP's maps.
        target: folder for a ``.sparse.safetensors`` file per weight file and ``sparse.json``, written last.
        digest: digest of the checkpoint.
    """

    source: Path
    target: Path
    digest: str

    def __str__(self) -> str:
        """Name of the work item."""
        return f"compress {self.source.name}"

    @property
    def record(self) -> Path:
        """What was measured: digest, bytes, dense bytes."""
        return self.target / "sparse.json"

    def is_there(self) -> bool:
        """Whether the copy was finished from the same checkpoint."""
        return self.record.is_file() and files.read_json(self.record)["digest"] == self.digest


class Compressor:
    """Writes one copy per call, one weight file in memory at a time."""

    def __call__(self, copy: Copy) -> str:
        """Write a copy and its record; returns the name of the checkpoint.

        Raises:
            DataError: a file does not expand to what it was made of.
        """
        files.write_json(copy.record, {"digest": copy.digest, **_written(copy)})
        return copy.source.name


def _written(copy: Copy) -> dict[str, int]:
    """Write the files; returns their bytes and those of the checkpoint's."""
    names = sparse_names(copy.source)
    sizes = {"bytes": 0, "dense_bytes": 0}
    for file in checkpoint.weight_files(copy.source):
        source, target = copy.source / file, copy.target / (Path(file).stem + sparse.SUFFIX)
        sparse.write_sparse(source, target, names)
        expanded, original = sparse.read_sparse(target), load_file(source)
        if expanded.keys() != original.keys() or not all(expanded[name].equal(original[name]) for name in original):
            raise DataError(f"{target} does not expand to {source}; delete it and run the same command again")
        sizes["bytes"] += target.stat().st_size
        sizes["dense_bytes"] += source.stat().st_size
    return sizes
