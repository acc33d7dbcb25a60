"""Recorded signals as Parquet, one file per (site, shard); readers trust the manifest only.

A signal is one ``fixed_size_binary(width * itemsize)`` value per token, lz4, without dictionary or statistics: written
at 490-930 MB/s where ``fixed_size_list<halffloat>`` reaches 54-190. bfloat16 has no Arrow type and travels as its
16-bit words. Shapes: T tokens, N neurons.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cria_dist.errors import DataError
from cria_dist.files import write_bytes
from cria_dist.records import ActivationShard

SCHEMA_VERSION = "1"
WORDS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}


def write_shard(
    path: Path, signals: Mapping[str, np.ndarray], tokens: Mapping[str, np.ndarray], dtype: str, site_key: str
) -> dict[str, object]:
    """Write one file atomically.

    Args:
        path: final name; depends on site and shard only.
        signals: by signal name, [T, N] in the words of ``dtype`` (bfloat16 as uint16).
        tokens: per-token integer columns (sequence, position), [T].
        dtype: data type of the signals.
        site_key: site the signals belong to.

    Returns:
        The facts a commit record needs: rows, bytes, sha256.
    """
    width = next(iter(signals.values())).shape[1]
    columns = [pa.array(values) for values in tokens.values()]
    for name, words_TN in signals.items():
        if words_TN.dtype != WORDS[dtype]:
            raise DataError(
                f"signal {name!r} at {site_key} has words {words_TN.dtype}, dtype {dtype} needs {WORDS[dtype]}"
            )
        contiguous = np.ascontiguousarray(words_TN)
        binary = pa.binary(width * contiguous.itemsize)
        columns.append(pa.Array.from_buffers(binary, len(contiguous), [None, pa.py_buffer(contiguous)]))
    metadata = {
        "cria.schema_version": SCHEMA_VERSION,
        "cria.dtype": dtype,
        "cria.site": site_key,
        "cria.width": str(width),
        "cria.signals": ",".join(signals),
    }
    table = pa.table(columns, names=[*tokens, *signals]).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression="lz4", use_dictionary=False, write_statistics=False, row_group_size=max(len(table), 1)
    )
    content = sink.getvalue()
    write_bytes(path, content)
    return {"rows": len(table), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_shard(shard: ActivationShard, sha256: str) -> dict[str, np.ndarray]:
    """The signals of one shard as float32 [T, N], by name, after checking bytes and schema.

    Raises:
        DataError: the file is missing, does not have the recorded bytes, or is of another schema version.
    """
    path = Path(shard.path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); run the same command again to record it") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} is not what was recorded (sha256 differs); delete it and run the same command again")
    table = pq.read_table(pa.BufferReader(content))
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("cria.schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path} has schema version {metadata.get('cria.schema_version')}, this is {SCHEMA_VERSION}")
    names = metadata["cria.signals"].split(",")
    return {name: _to_float32(table.column(name), metadata) for name in names}


def _to_float32(column: pa.ChunkedArray, metadata: Mapping[str, str]) -> np.ndarray:
    dtype, width = metadata["cria.dtype"], int(metadata["cria.width"])
    parts = [
        np.frombuffer(chunk.buffers()[1], WORDS[dtype])[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        for chunk in column.chunks
    ]
    words_TN = np.concatenate(parts).reshape(-1, width)
    if dtype == "bfloat16":
        return (words_TN.astype(np.uint32) << 16).view(np.float32)
    return words_TN.astype(np.float32)
