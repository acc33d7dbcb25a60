"""Learned gates of all sites as one npz file; no pickle. Shapes: N units."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cria_dist.errors import DataError
from cria_dist.files import write_bytes
from cria_dist.records import Float64, Site
from cria_dist.store.site_scores import DAMAGE


@dataclass(frozen=True, slots=True)
class Gates:
    """Where the gates of a model are, and what they were learned from.

    Attributes:
        path: the file.
        digest: digest of model, tokens, method, numerics and seed.
    """

    path: Path
    digest: str

    def write(self, learned: Mapping[Site, Float64]) -> None:
        """Write what the gates of all sites learned."""
        sink = io.BytesIO()
        arrays = {site.key: learned_N for site, learned_N in learned.items()}
        np.savez(sink, digest=np.str_(self.digest), **arrays)  # pyright: ignore[reportArgumentType]  (a numpy scalar)
        write_bytes(self.path, sink.getvalue())

    def there(self) -> bool:
        """Whether the file is there, whole, and learned from the same."""
        try:
            return bool(self._load())
        except DAMAGE:
            return False

    def read(self, site: Site) -> Float64:
        """What the gates of a site learned, float64 [N].

        Raises:
            DataError: the file is missing or damaged, or of something else.
        """
        try:
            return self._load()[site.key]
        except DAMAGE as error:
            raise DataError(
                f"{self.path} cannot be read ({error}); delete it and run the same command again"
            ) from error

    def _load(self) -> dict[str, np.ndarray]:
        """All of the file, so that a damaged one is found out."""
        with np.load(io.BytesIO(self.path.read_bytes()), allow_pickle=False) as arrays:
            found = dict(arrays)
        if str(found.pop("digest")) != self.digest:
            raise ValueError("learned from something else")
        return found
