"""Moments of shards and their sum."""

from pathlib import Path

import numpy as np
import pytest

from cria_dist.errors import DataError
from cria_dist.store.moments import read_moments, write_moments

N = 5


def shards(folder: Path, parts: list[np.ndarray]) -> list[tuple[Path, str]]:
    written = []
    for number, part_TN in enumerate(parts):
        path = folder / "moments" / f"shard-{number:05d}.safetensors"
        total_N, gram_NN = part_TN.sum(axis=0, dtype=np.float32), part_TN.T @ part_TN
        written.append((path, str(write_moments(path, len(part_TN), total_N, gram_NN)["sha256"])))
    return written


@pytest.fixture
def signal_TN() -> np.ndarray:
    return np.random.default_rng(0).normal(1.0, 2.0, size=(90, N)).astype(np.float32)


def test_parts_add_up_to_the_whole(tmp_path: Path, signal_TN: np.ndarray) -> None:
    moments = read_moments(shards(tmp_path, np.split(signal_TN, [10, 11, 60])))
    wide_TN = signal_TN.astype(np.float64)
    assert moments.count == 90
    assert moments.gram_NN.dtype == moments.total_N.dtype == np.float64
    assert np.allclose(moments.total_N, wide_TN.sum(axis=0), rtol=1e-6)
    assert np.allclose(moments.gram_NN, wide_TN.T @ wide_TN, rtol=1e-5, atol=1e-4)
    assert np.allclose(moments.mean_N, wide_TN.mean(axis=0), rtol=1e-6)
    assert np.allclose(moments.std_N, wide_TN.std(axis=0), rtol=1e-5)


def test_the_sum_is_made_in_the_order_given_in_double_precision(tmp_path: Path) -> None:
    """1 vanishes beside 2**24 in float32: a sum in single precision would lose all of them."""
    big, small = np.full((1, N), 2.0**12, np.float32), np.ones((1, N), np.float32)
    files = shards(tmp_path, [big, *[small] * 8])
    assert read_moments(files).gram_NN[0, 0] == 2.0**24 + 8
    assert read_moments(files[:1]).gram_NN[0, 0] == 2.0**24
    expected = sum(0.1 * np.float32(k) for k in range(3))
    ordered = shards(tmp_path / "b", [np.full((1, N), np.float32(0.1) * np.float32(k), np.float32) for k in range(3)])
    one, two = read_moments(ordered), read_moments(ordered)
    assert one.total_N.tobytes() == two.total_N.tobytes()
    assert np.allclose(one.total_N, expected)


def test_writing_is_deterministic(tmp_path: Path, signal_TN: np.ndarray) -> None:
    assert [sha for _, sha in shards(tmp_path / "a", [signal_TN])] == [
        sha for _, sha in shards(tmp_path / "b", [signal_TN])
    ]


def test_facts_describe_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    facts = write_moments(path, 3, np.zeros(N, np.float32), np.zeros((N, N), np.float32))
    assert facts["bytes"] == path.stat().st_size


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_an_error_that_names_the_file(damage: str, tmp_path: Path, signal_TN: np.ndarray) -> None:
    files = shards(tmp_path, np.split(signal_TN, 3))
    path = files[1][0]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "delete":
        path.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors .*run the same command again"):
        read_moments(files)


def test_no_shards_is_an_error() -> None:
    with pytest.raises(DataError, match="no shard has moments"):
        read_moments([])
