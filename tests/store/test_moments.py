"""Moments of shards: half of a Gram matrix on disk, all of it in the sum."""

import hashlib

import numpy as np
import pytest

from cria_dist.errors import DataError
from cria_dist.records import Moments, Site
from cria_dist.store import moments
from cria_dist.store.recording import Recording, Slice
from cria_dist.store.storage import LocalStorage

N = 5
SITE = Site(0)


def recorded(storage: LocalStorage, parts: list[np.ndarray], slices: tuple[Slice, ...] = (Slice(0, N),)) -> Moments:
    """Write the sums over each part as a shard of its own; what the reader makes of all."""
    recording = Recording(storage, "d1")
    for shard, part_TN in enumerate(parts):
        committed = []
        for units in slices:
            own_TU = part_TN[:, units.start : units.stop]
            sums = (len(part_TN), own_TU.sum(axis=0, dtype=np.float32), own_TU.T @ part_TN)
            facts = recording.write_moments(SITE, shard, units, sums)
            signals = {"rows": 0, "bytes": 0, "sha256": ""}
            committed.append({"start": units.start, "stop": units.stop, "signals": signals, "moments": facts})
        recording.commit(SITE, shard, N, "float32", committed)
    recording.write_manifest([SITE], len(parts))
    return recording.moments(SITE)


@pytest.fixture
def signal_TN() -> np.ndarray:
    return np.random.default_rng(0).normal(1.0, 2.0, size=(90, N)).astype(np.float32)


@pytest.fixture
def storage(tmp_path_factory: pytest.TempPathFactory) -> LocalStorage:
    return LocalStorage(tmp_path_factory.mktemp("recording"))


@pytest.mark.parametrize("block_rows", [1, 2, 512])
def test_parts_add_up_to_the_whole(
    block_rows: int, storage: LocalStorage, signal_TN: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "BLOCK_ROWS", block_rows)
    found = recorded(storage, np.split(signal_TN, [10, 11, 60]))
    wide_TN = signal_TN.astype(np.float64)
    assert found.count == 90
    assert found.gram_NN.dtype == found.total_N.dtype == np.float64
    assert np.allclose(found.total_N, wide_TN.sum(axis=0), rtol=1e-6)
    assert np.allclose(found.gram_NN, wide_TN.T @ wide_TN, rtol=1e-5, atol=1e-4)
    assert np.allclose(found.mean_N, wide_TN.mean(axis=0), rtol=1e-6)
    assert np.allclose(found.std_N, wide_TN.std(axis=0), rtol=1e-5)


@pytest.mark.parametrize("block_rows", [1, 2, 3, 512])
def test_slices_of_ranks_and_blocks_of_rows_change_no_bit(
    block_rows: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of whole numbers: every order of summation gives the same."""
    whole_TN = np.random.default_rng(1).integers(-9, 9, size=(40, N)).astype(np.float32)
    expected = recorded(LocalStorage(tmp_path_factory.mktemp("whole")), np.split(whole_TN, 2))
    monkeypatch.setattr(moments, "BLOCK_ROWS", block_rows)
    slices = (Slice(0, 2), Slice(2, 3), Slice(3, N))
    found = recorded(LocalStorage(tmp_path_factory.mktemp("sliced")), np.split(whole_TN, 2), slices)
    assert found.count == expected.count == 40
    assert np.array_equal(found.total_N, expected.total_N)
    assert np.array_equal(found.gram_NN, expected.gram_NN)
    assert np.array_equal(found.gram_NN, (whole_TN.T @ whole_TN).astype(np.float64))


def test_the_sum_is_made_in_the_order_given_in_double_precision(storage: LocalStorage) -> None:
    """1 vanishes beside 2**24 in float32: a sum in single precision would lose all of them."""
    big, small = np.full((1, N), 2.0**12, np.float32), np.ones((1, N), np.float32)
    assert recorded(storage, [big, *[small] * 8]).gram_NN[0, 0] == 2.0**24 + 8
    parts = [np.full((1, N), np.float32(0.1) * np.float32(k), np.float32) for k in range(3)]
    one, two = recorded(storage, parts), recorded(storage, parts)
    assert one.total_N.tobytes() == two.total_N.tobytes()
    assert np.allclose(one.total_N, sum(0.1 * np.float32(k) for k in range(3)))


def test_half_of_the_matrix_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "BLOCK_ROWS", 16)
    gram_NN = np.ones((256, 256), np.float32)
    assert len(moments.encode(1, np.ones(256, np.float32), gram_NN)) < 0.56 * gram_NN.nbytes


@pytest.mark.parametrize("units", [16, 512, 1300])
def test_the_size_of_a_file_is_known_beforehand(units: int) -> None:
    content = moments.encode(1, np.ones(units, np.float32), np.ones((units, units), np.float32))
    assert 0 < len(content) - moments.stored_bytes(units) < 1024


def test_what_lies_below_the_diagonal_is_the_mirror_of_what_lies_above(storage: LocalStorage) -> None:
    """A product of matrices need not be symmetric to the last bit; a Gram matrix must be."""
    gram_NN = np.arange(N * N, dtype=np.float32).reshape(N, N)
    content = moments.encode(3, np.zeros(N, np.float32), gram_NN)
    whole_NN = np.zeros((N, N))
    moments.decode(content, "x", hashlib.sha256(content).hexdigest()).add_to(whole_NN)
    moments.mirror(whole_NN)
    assert np.array_equal(whole_NN, np.triu(gram_NN) + np.triu(gram_NN, 1).T)


def test_writing_is_deterministic(signal_TN: np.ndarray) -> None:
    one, two = (moments.encode(90, signal_TN.sum(axis=0), signal_TN.T @ signal_TN) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_an_error_that_names_the_file(damage: str, storage: LocalStorage, signal_TN: np.ndarray) -> None:
    recorded(storage, np.split(signal_TN, 3))
    (path,) = storage.folder.glob("moments/*/shard-00001.*")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "delete":
        path.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.units-00000-00005\.safetensors .*run the same command again"):
        Recording(storage, "d1").moments(SITE)
