"""Recorded signals as Parquet, one file per (site, shard, slice of units); readers trust the manifest only.

A signal is one ``fixed_size_binary(units * itemsize)`` value per token, lz4, without dictionary or statistics: written
at 490-930 MB/s where ``fixed_size_list<halffloat>`` reaches 54-190. More than 8192 units are cut into tiles, a column
each, so that a reader can take some of them. bfloat16 has no Arrow type and travels as its 16-bit words.
Shapes: T tokens, N units of the file.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cria_dist.errors import DataError
from cria_dist.records import ActivationShard

SCHEMA_VERSION = "2"
WORDS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
TILE_UNITS = 8192

Tiles = list[tuple[int, np.ndarray]]
"""Blocks of a signal, each with its first unit: words [T, n], views of the decompressed file."""


@dataclass(frozen=True, slots=True)
class SignalTable:
    """What one file holds.

    Attributes:
        signals: by signal name, [T, N] in the words of ``dtype`` (bfloat16 as uint16).
        tokens: integer columns per token (sequence, position), [T].
        dtype: data type of the signals.
    """

    signals: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    dtype: str

    @property
    def rows(self) -> int:
        """Sampled tokens."""
        return len(next(iter(self.tokens.values())))


def encode(table: SignalTable, site_key: str) -> bytes:
    """The bytes of one Parquet file.

    Raises:
        DataError: a signal does not have the words of the data type.
    """
    columns = {name: pa.array(values) for name, values in table.tokens.items()}
    width = next(iter(table.signals.values())).shape[1]
    for name, words_TN in table.signals.items():
        if words_TN.dtype != WORDS[table.dtype]:
            raise DataError(
                f"signal {name!r} at {site_key} has words {words_TN.dtype}, dtype {table.dtype} needs "
                f"{WORDS[table.dtype]}"
            )
        for start in range(0, width, TILE_UNITS):
            columns[f"{name}.{start:05d}"] = _binary_column(words_TN[:, start : start + TILE_UNITS])
    metadata = {
        "cria.schema_version": SCHEMA_VERSION,
        "cria.dtype": table.dtype,
        "cria.site": site_key,
        "cria.width": str(width),
        "cria.signals": ",".join(table.signals),
    }
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns).replace_schema_metadata(metadata),
        sink,
        compression="lz4",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=max(table.rows, 1),
    )
    return sink.getvalue()


def _binary_column(words_TN: np.ndarray) -> pa.Array:
    contiguous = np.ascontiguousarray(words_TN)
    binary = pa.binary(contiguous.shape[1] * contiguous.itemsize)
    return pa.Array.from_buffers(binary, len(contiguous), [None, pa.py_buffer(contiguous)])


def decode(content: bytes, shard: ActivationShard, sha256: str) -> dict[str, Tiles]:
    """The signals of one file, by name, as views of its decompressed columns.

    Raises:
        DataError: these are not the recorded bytes, or they are of another schema version.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            f"{shard.path} is not what was recorded (sha256 differs); delete it and run the same command again"
        )
    table = pq.read_table(pa.BufferReader(content))
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("cria.schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{shard.path} has schema version {metadata.get('cria.schema_version')}, this is {SCHEMA_VERSION}"
        )
    tiles: dict[str, Tiles] = {}
    for name in metadata["cria.signals"].split(","):
        for column in (one for one in table.column_names if one.startswith(f"{name}.")):
            words_TN = _words(table.column(column).combine_chunks(), WORDS[shard.dtype])
            tiles.setdefault(name, []).append((int(column.rpartition(".")[2]), words_TN))
    return tiles


def _words(column: pa.Array, words: np.dtype) -> np.ndarray:
    """View of a binary column as [T, n]; no copy."""
    width = column.type.byte_width // words.itemsize
    flat = np.frombuffer(column.buffers()[1], words)
    return flat[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)


def to_float32(words_TN: np.ndarray, dtype: str, target_TN: np.ndarray) -> None:
    """Convert stored words into ``target_TN`` (float32, any strides)."""
    if dtype == "bfloat16":
        target_TN[...] = (words_TN.astype(np.uint32) << 16).view(np.float32)
    else:
        target_TN[...] = words_TN
