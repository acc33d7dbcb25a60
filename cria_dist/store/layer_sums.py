"""What a layer method measured, as npz: the sums of one shard, or of all of them; no pickle on either side."""

import io
from pathlib import Path

import numpy as np

from cria_dist.errors import DataError
from cria_dist.files import write_bytes
from cria_dist.records import Float64
from cria_dist.store.site_scores import DAMAGE

WHOLE = "all"
"""Name of the sums over all shards."""


def shard_name(shard: int) -> str:
    """Name of the sums of one shard."""
    return f"shard-{shard:05d}"


def write_sums(folder: Path, name: str, total: Float64, digest: str) -> None:
    """Write ``layers/<name>.npz``."""
    sink = io.BytesIO()
    np.savez(sink, digest=np.str_(digest), total=total)  # pyright: ignore[reportArgumentType]  (savez takes scalars)
    write_bytes(_path(folder, name), sink.getvalue())


def read_sums(folder: Path, name: str, digest: str) -> Float64 | None:
    """The sums, or None if there are none of the same inputs (or they are damaged: measuring again is cheap)."""
    path = _path(folder, name)
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return arrays["total"] if str(arrays["digest"]) == digest else None
    except DAMAGE:
        return None


def need_sums(folder: Path, name: str, digest: str) -> Float64:
    """The same where they must be there.

    Raises:
        DataError: they are missing or damaged.
    """
    total = read_sums(folder, name, digest)
    if total is None:
        raise DataError(f"{_path(folder, name)} is missing or damaged; run the same command again")
    return total


def _path(folder: Path, name: str) -> Path:
    return folder / "layers" / f"{name}.npz"
