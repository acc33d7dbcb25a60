"""Recorded signals as Parquet, one file per (site, shard, slice of units); readers trust the manifest only.

A signal is one ``fixed_size_binary(units * itemsize)`` value per token, lz4, without dictionary or statistics: written
at 490-930 MB/s where ``fixed_size_list<halffloat>`` reaches 54-190. More than 8192 units are cut into tiles, a column
each, so that a reader can take some of them. bfloat16 has no Arrow type and travels as its 16-bit words.
Shapes: T tokens, N units of the file.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cria_dist.errors import DataError

SCHEMA_VERSION = "2"
WORDS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
TILE_UNITS = 8192

Tiles = list[tuple[int, np.ndarray]]
"""Blocks of a signal, each with its first unit: words [T, n], views of the decompressed file."""


@dataclass(frozen=True, slots=True)
class StoredSignals:
    """What a file gives back.

    Attributes:
        tiles: by signal name, views of the decompressed columns.
        tokens: integer columns per token (sequence, position), [T].
        known: every signal of the file, read or not.
    """

    tiles: Mapping[str, Tiles]
    tokens: Mapping[str, np.ndarray]
    known: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Sampled tokens."""
        return len(next(iter(self.tokens.values())))


@dataclass(frozen=True, slots=True)
class SignalTable:
    """What one file is made of.

    Attributes:
        signals: by signal name, its tiles (see :func:`tile_bounds`), each [T, n] in the words of ``dtype`` (bfloat16 as
            uint16) and contiguous.
        tokens: integer columns per token (sequence, position), [T].
        dtype: data type of the signals.
    """

    signals: Mapping[str, Sequence[np.ndarray]]
    tokens: Mapping[str, np.ndarray]
    dtype: str

    @property
    def rows(self) -> int:
        """Sampled tokens."""
        return len(next(iter(self.tokens.values())))


def tile_bounds(units: int) -> list[tuple[int, int]]:
    """First unit and end of every tile of a signal."""
    return [(start, min(start + TILE_UNITS, units)) for start in range(0, units, TILE_UNITS)]


def encode(table: SignalTable, site_key: str, sink: pa.NativeFile) -> None:
    """Write one Parquet file into a sink, without a copy of the signals.

    Raises:
        DataError: a signal does not have the words of the data type.
    """
    pq.write_table(
        _arrow_table(table, site_key),
        sink,
        compression="lz4",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=max(table.rows, 1),
    )


def _arrow_table(table: SignalTable, site_key: str) -> pa.Table:
    columns = {name: pa.array(values) for name, values in table.tokens.items()}
    width = 0
    for name, tiles in table.signals.items():
        width = 0
        for words_TN in tiles:
            if words_TN.dtype != WORDS[table.dtype]:
                raise DataError(
                    f"signal {name!r} at {site_key} has words {words_TN.dtype}, dtype {table.dtype} needs "
                    f"{WORDS[table.dtype]}"
                )
            columns[f"{name}.{width:05d}"] = binary_column(words_TN)
            width += words_TN.shape[1]
    metadata = {
        "cria.schema_version": SCHEMA_VERSION,
        "cria.dtype": table.dtype,
        "cria.site": site_key,
        "cria.width": str(width),
        "cria.signals": ",".join(table.signals),
    }
    return pa.table(columns).replace_schema_metadata(metadata)


def binary_column(words_TN: np.ndarray) -> pa.Array:
    """One fixed-size value per token: a view of the words, which must be contiguous."""
    binary = pa.binary(words_TN.shape[1] * words_TN.itemsize)
    return pa.Array.from_buffers(binary, len(words_TN), [None, pa.py_buffer(words_TN)])


def decode(content: bytes, path: str, sha256: str, only: Collection[str] = ()) -> StoredSignals:
    """Inverse of :func:`encode`.

    Args:
        content: the file.
        path: its name, for messages.
        sha256: what the commit record says of it.
        only: read these signals; by default all.

    Raises:
        DataError: these are not the recorded bytes, or they are of another schema version.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} is not what was recorded (sha256 differs); delete it and run the same command again")
    file = pq.ParquetFile(pa.BufferReader(content))
    metadata = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    if metadata.get("cria.schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {metadata.get('cria.schema_version')}, this version reads {SCHEMA_VERSION}; "
            "record into another folder"
        )
    words = WORDS[metadata["cria.dtype"]]
    known = tuple(metadata["cria.signals"].split(","))
    wanted = [name for name in known if not only or name in only]
    columns = {name: [one for one in file.schema_arrow.names if one.startswith(f"{name}.")] for name in wanted}
    tokens = [name for name in file.schema_arrow.names if "." not in name]
    table = file.read([*tokens, *(one for names in columns.values() for one in names)])
    tiles = {
        name: [(int(one.rpartition(".")[2]), _words(table.column(one), words)) for one in names]
        for name, names in columns.items()
    }
    return StoredSignals(tiles, {name: table.column(name).to_numpy() for name in tokens}, known)


def _words(chunks: pa.ChunkedArray, words: np.dtype) -> np.ndarray:
    """View of a binary column as [T, n]; no copy, for a row group is one chunk."""
    column = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
    width = column.type.byte_width // words.itemsize
    flat = np.frombuffer(column.buffers()[1], words)
    return flat[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)


def to_float32(words_TN: np.ndarray, dtype: str, target_TN: np.ndarray) -> None:
    """Convert stored words into ``target_TN`` (float32, any strides) without a temporary of their size."""
    if dtype == "bfloat16":
        np.left_shift(words_TN, np.uint32(16), out=target_TN.view(np.uint32))
    else:
        target_TN[...] = words_TN
