"""Signals of one shard: what is read is what was written, or an error that names the file."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cria_dist.errors import DataError
from cria_dist.records import ActivationShard, Site
from cria_dist.store import activations

ROWS, WIDTH = 11, 6
TOKENS = {"sequence": np.arange(ROWS, dtype=np.int32) // 4, "position": np.arange(ROWS, dtype=np.int32) % 4}
BFLOAT16_WORDS = np.array(
    [0x0000, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x807F, 0x7F7F, 0xFF7F, 0x4049, 0x3EAB, 0x0080, 0xC2F7], dtype=np.uint16
)
"""Zeros of both signs, one, subnormals, the largest numbers, pi, a third, the smallest normal number, -123.5."""


def words(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if dtype == "bfloat16":
        return {
            "gate": np.resize(BFLOAT16_WORDS, (ROWS, WIDTH)),
            "output": np.resize(BFLOAT16_WORDS[::-1], (ROWS, WIDTH)),
        }
    return {name: rng.normal(size=(ROWS, WIDTH)).astype(dtype) for name in ("gate", "output")}


def pointer(path: Path, dtype: str = "float32") -> ActivationShard:
    return ActivationShard(Site(0), 0, str(path), ROWS, WIDTH, dtype)


def written(path: Path, dtype: str = "float32") -> str:
    return str(activations.write_shard(path, words(dtype), TOKENS, dtype, "layer-000.mlp")["sha256"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "shard.parquet"
    facts = activations.write_shard(path, words(dtype), TOKENS, dtype, "layer-000.mlp")
    content = path.read_bytes()
    assert facts == {"rows": ROWS, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read = activations.read_shard(pointer(path, dtype), str(facts["sha256"]))
    assert list(read) == ["gate", "output"]
    for name, words_TN in words(dtype).items():
        assert read[name].dtype == np.float32
        assert read[name].shape == (ROWS, WIDTH)
        if dtype == "bfloat16":  # the upper half of the float32 word, exactly
            found = read[name].view(np.uint32)
            assert np.array_equal(found >> 16, words_TN.astype(np.uint32))
            assert not (found & 0xFFFF).any()
        else:
            assert np.array_equal(read[name], words_TN.astype(np.float32))


def test_bfloat16_words_mean_what_torch_means() -> None:
    import torch

    numbers = torch.tensor([3.140625, -123.5, 1e-30, 65536.0], dtype=torch.bfloat16)
    column = numbers.view(torch.uint16).numpy().astype(np.uint32) << 16
    assert np.array_equal(column.view(np.float32), numbers.float().numpy())


def test_the_file_says_what_it_is_and_where_each_row_is_from(tmp_path: Path) -> None:
    written(tmp_path / "shard.parquet", "bfloat16")
    table = pq.read_table(tmp_path / "shard.parquet")
    assert table.schema.metadata == {
        b"cria.schema_version": b"1",
        b"cria.dtype": b"bfloat16",
        b"cria.site": b"layer-000.mlp",
        b"cria.width": b"6",
        b"cria.signals": b"gate,output",
    }
    for name, values in TOKENS.items():
        assert table.column(name).to_pylist() == values.tolist()


def test_not_contiguous_signals_are_written_right(tmp_path: Path) -> None:
    whole = words("float32")["gate"]
    facts = activations.write_shard(tmp_path / "shard", {"gate": np.asfortranarray(whole)}, TOKENS, "float32", "x")
    assert np.array_equal(activations.read_shard(pointer(tmp_path / "shard"), str(facts["sha256"]))["gate"], whole)


def test_a_shard_without_sampled_tokens(tmp_path: Path) -> None:
    """Fewer sampled tokens than sequences leave the last shards without any."""
    empty = {"gate": np.zeros((0, WIDTH), np.float32)}
    facts = activations.write_shard(tmp_path / "shard", empty, {"sequence": np.zeros(0, np.int32)}, "float32", "x")
    assert activations.read_shard(pointer(tmp_path / "shard"), str(facts["sha256"]))["gate"].shape == (0, WIDTH)


def test_words_of_another_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'gate' at layer-000\.mlp has words float32, dtype bfloat16 needs uint16"):
        activations.write_shard(tmp_path / "shard", words("float32"), TOKENS, "bfloat16", "layer-000.mlp")
    assert not list(tmp_path.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_off, Path.unlink])
def test_damage_is_an_error_that_names_the_file(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    sha256 = written(path)
    damage(path)
    with pytest.raises(DataError, match=r"shard-00000\.parquet .*run the same command again"):
        activations.read_shard(pointer(path), sha256)


def test_another_schema_version_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard-00000.parquet"
    monkeypatch.setattr(activations, "SCHEMA_VERSION", "99")
    sha256 = written(path)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"shard-00000\.parquet has schema version 99, this is 1"):
        activations.read_shard(pointer(path), sha256)
