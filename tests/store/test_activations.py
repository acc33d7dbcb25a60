"""Signals of one shard: what is read is what was written, or an error that names the file."""

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cria_dist.errors import DataError
from cria_dist.store import activations
from cria_dist.store.activations import SignalTable, StoredSignals

ROWS, WIDTH = 11, 6
TOKENS = {"sequence": np.arange(ROWS, dtype=np.int32) // 4, "position": np.arange(ROWS, dtype=np.int32) % 4}
BFLOAT16_WORDS = np.array(
    [0x0000, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x807F, 0x7F7F, 0xFF7F, 0x4049, 0x3EAB, 0x0080, 0xC2F7], dtype=np.uint16
)
"""Zeros of both signs, one, subnormals, the largest numbers, pi, a third, the smallest normal number, -123.5."""
PATH = "folder/shard-00000.parquet"


def words(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if dtype == "bfloat16":
        return {
            "gate": np.resize(BFLOAT16_WORDS, (ROWS, WIDTH)),
            "output": np.resize(BFLOAT16_WORDS[::-1], (ROWS, WIDTH)),
        }
    return {name: rng.normal(size=(ROWS, WIDTH)).astype(dtype) for name in ("gate", "output")}


def encoded(signals: dict[str, np.ndarray], dtype: str = "float32", tokens: dict[str, np.ndarray] = TOKENS) -> bytes:
    tiles = {
        name: [np.ascontiguousarray(words[:, start:stop]) for start, stop in activations.tile_bounds(words.shape[1])]
        for name, words in signals.items()
    }
    target = pa.BufferOutputStream()
    activations.encode(SignalTable(tiles, tokens, dtype), "layer-000.mlp", target)
    return target.getvalue().to_pybytes()


def decoded(content: bytes, only: tuple[str, ...] = ()) -> StoredSignals:
    return activations.decode(content, PATH, hashlib.sha256(content).hexdigest(), only)


def as_float32(stored: StoredSignals, name: str, dtype: str) -> np.ndarray:
    width = sum(words_TN.shape[1] for _, words_TN in stored.tiles[name])
    whole_NT = np.full((width, stored.rows), np.nan, dtype=np.float32)
    for start, words_TN in stored.tiles[name]:
        activations.to_float32(words_TN, dtype, whole_NT[start : start + words_TN.shape[1]].T)
    return whole_NT.T


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(dtype: str) -> None:
    stored = decoded(encoded(words(dtype), dtype))
    assert list(stored.tiles) == list(stored.known) == ["gate", "output"]
    assert stored.rows == ROWS
    for name, words_TN in words(dtype).items():
        assert np.array_equal(stored.tiles[name][0][1], words_TN)
        found = as_float32(stored, name, dtype)
        if dtype == "bfloat16":  # the upper half of the float32 word, exactly
            assert np.array_equal(found.view(np.uint32) >> 16, words_TN.astype(np.uint32))
            assert not (found.view(np.uint32) & 0xFFFF).any()
        else:
            assert np.array_equal(found, words_TN.astype(np.float32))


def test_bfloat16_words_mean_what_torch_means() -> None:
    import torch

    numbers = torch.tensor([[3.140625, -123.5, 1e-30, 65536.0]], dtype=torch.bfloat16)
    found = np.empty((1, 4), np.float32)
    activations.to_float32(numbers.view(torch.uint16).numpy(), "bfloat16", found)
    assert np.array_equal(found, numbers.float().numpy())


def test_the_file_says_what_it_is_and_where_each_row_is_from() -> None:
    content = encoded(words("bfloat16"), "bfloat16")
    table = pq.read_table(pa.BufferReader(content))
    assert table.schema.metadata == {
        b"cria.schema_version": b"2",
        b"cria.dtype": b"bfloat16",
        b"cria.site": b"layer-000.mlp",
        b"cria.width": b"6",
        b"cria.signals": b"gate,output",
    }
    for name, values in TOKENS.items():
        assert table.column(name).to_pylist() == values.tolist()
        assert np.array_equal(decoded(content).tokens[name], values)


def test_encoding_is_deterministic() -> None:
    assert encoded(words("float32")) == encoded(words("float32"))


def test_many_units_are_cut_into_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "TILE_UNITS", 4)
    content = encoded(words("float32"))
    assert pq.read_schema(pa.BufferReader(content)).names[2:] == [
        "gate.00000",
        "gate.00004",
        "output.00000",
        "output.00004",
    ]
    stored = decoded(content)
    assert [(start, tile.shape) for start, tile in stored.tiles["gate"]] == [(0, (ROWS, 4)), (4, (ROWS, 2))]
    assert np.array_equal(as_float32(stored, "gate", "float32"), words("float32")["gate"])


def test_one_signal_alone() -> None:
    stored = decoded(encoded(words("float32")), only=("output",))
    assert list(stored.tiles) == ["output"]
    assert stored.known == ("gate", "output")
    assert np.array_equal(stored.tiles["output"][0][1], words("float32")["output"])


def test_tiles_are_views_of_what_arrow_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as a real shard; what the Parquet reader returned is kept, and must hold the memory of the tiles."""
    tables = []

    class Remembering(pq.ParquetFile):
        def read(self, *arguments: object, **settings: object) -> pa.Table:
            tables.append(super().read(*arguments, **settings))
            return tables[-1]

    monkeypatch.setattr(activations.pq, "ParquetFile", Remembering)
    large = {"gate": np.random.default_rng(0).normal(size=(4096, 1536)).astype(np.float32)}
    tokens = {"sequence": np.zeros(4096, np.int32)}
    (_, tile_TN), *others = decoded(encoded(large, tokens=tokens)).tiles["gate"]
    assert not others
    (chunk,) = tables[0].column("gate.00000").chunks
    assert np.shares_memory(tile_TN, np.frombuffer(chunk.buffers()[1], np.float32))
    assert not tile_TN.flags.owndata
    assert tile_TN.flags.c_contiguous
    assert np.array_equal(tile_TN, large["gate"])


def test_contiguous_signals_are_encoded_from_where_they_are() -> None:
    whole = words("float32")["gate"]
    column = activations.binary_column(whole)
    assert np.shares_memory(np.frombuffer(column.buffers()[1], np.float32), whole)


def test_not_contiguous_signals_are_written_right() -> None:
    whole = words("float32")["gate"]
    stored = decoded(encoded({"gate": np.asfortranarray(whole), "up": np.repeat(whole, 2, axis=1)[:, ::2]}))
    assert np.array_equal(stored.tiles["gate"][0][1], whole)
    assert np.array_equal(stored.tiles["up"][0][1], whole)


def test_a_shard_without_sampled_tokens() -> None:
    """Fewer sampled tokens than sequences leave the last shards without any."""
    tokens = {"sequence": np.zeros(0, np.int32), "position": np.zeros(0, np.int32)}
    stored = decoded(encoded({"gate": np.zeros((0, WIDTH), np.float32)}, tokens=tokens))
    assert stored.tiles["gate"][0][1].shape == (0, WIDTH)
    assert stored.rows == 0


def test_data_that_lz4_cannot_compress_fits_the_buffer() -> None:
    noise = np.random.default_rng(0).integers(0, 2**16, size=(3000, 700), dtype=np.uint16)
    content = encoded({"gate": noise}, "bfloat16", {"sequence": np.arange(3000, dtype=np.int32)})
    assert len(content) > noise.nbytes
    assert np.array_equal(decoded(content).tiles["gate"][0][1], noise)


def test_words_of_another_dtype_are_refused() -> None:
    with pytest.raises(DataError, match=r"'gate' at layer-000\.mlp has words float32, dtype bfloat16 needs uint16"):
        encoded(words("float32"), "bfloat16")


def flip_a_byte(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 3] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", [flip_a_byte, lambda content: content[:-7], lambda _: b""])
def test_damage_is_an_error_that_names_the_file(damage: Callable[[bytes], bytes]) -> None:
    content = encoded(words("float32"))
    with pytest.raises(DataError, match=r"shard-00000\.parquet .*delete it and run the same command again"):
        activations.decode(damage(content), PATH, hashlib.sha256(content).hexdigest())


def test_another_schema_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SCHEMA_VERSION", "99")
    content = encoded(words("float32"))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"shard-00000\.parquet has schema version 99, this version reads 2"):
        decoded(content)
