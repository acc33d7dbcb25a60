"""Saliences of one shard as an npz file, an array per site; no pickle. Shapes: S shards, N units."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cria_dist.errors import DataError
from cria_dist.files import write_bytes
from cria_dist.records import Float64, Site

DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What NumPy raises at a file that is missing, cut, changed, of another kind, or pickled."""


@dataclass(frozen=True, slots=True)
class Saliences:
    """Where the saliences of a model are, and what they are of.

    Attributes:
        folder: one file per shard.
        digest: digest of model, sequences and numerics.
        counts: sequences per shard.
    """

    folder: Path
    digest: str
    counts: tuple[int, ...]

    def write(self, shard: int, values: Mapping[Site, Float64]) -> None:
        """Write the saliences of all sites in one shard."""
        sink = io.BytesIO()
        arrays = {site.key: values_N for site, values_N in values.items()}
        np.savez(sink, digest=np.str_(self.digest), **arrays)  # pyright: ignore[reportArgumentType]  (a numpy scalar)
        write_bytes(self._path(shard), sink.getvalue())

    def has(self, shard: int) -> bool:
        """Whether the shard is there, whole, and of the same model and sequences."""
        try:
            return bool(self._load(shard))
        except DAMAGE:
            return False

    def mean(self, site: Site) -> Float64:
        """Mean over the shards, weighted by their sequences and added up in their order, float64 [N].

        Raises:
            DataError: a shard is missing or damaged, or of something else.
        """
        values_SN = np.stack([self._read(shard, site) for shard in range(len(self.counts))])
        return np.average(values_SN, axis=0, weights=self.counts)

    def _read(self, shard: int, site: Site) -> Float64:
        try:
            return self._load(shard)[site.key]
        except DAMAGE as error:
            raise DataError(
                f"{self._path(shard)} cannot be read ({error}); delete it and run the same command again"
            ) from error

    def _load(self, shard: int) -> dict[str, np.ndarray]:
        """All of a file, so that a damaged one is found out."""
        with np.load(io.BytesIO(self._path(shard).read_bytes()), allow_pickle=False) as arrays:
            found = dict(arrays)
        if str(found.pop("digest")) != self.digest:
            raise ValueError("of another model or other sequences")
        return found

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npz"
