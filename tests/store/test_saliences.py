"""Sums per unit of one shard each: what is written, what is not believed, how shards are averaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cria_dist.errors import DataError
from cria_dist.records import Site
from cria_dist.store.saliences import Saliences

ONE, TWO = Site(0), Site(1)


@pytest.fixture
def written(tmp_path: Path) -> Saliences:
    """Two shards of 3 and 1 sequences."""
    saliences = Saliences(tmp_path, "d1", (3, 1))
    for shard, value in enumerate((1.0, 5.0)):
        saliences.write(shard, {ONE: np.full(4, value), TWO: np.arange(6.0) * value})
    return saliences


def test_the_mean_counts_sequences(written: Saliences) -> None:
    assert written.mean(ONE).tolist() == [2.0] * 4
    assert written.mean(TWO).tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_the_same_values_give_the_same_bytes(written: Saliences, tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.npz"
    before = path.read_bytes()
    written.write(0, {ONE: np.full(4, 1.0), TWO: np.arange(6.0)})
    assert path.read_bytes() == before


def test_only_what_is_whole_and_of_the_same_model_is_there(written: Saliences, tmp_path: Path) -> None:
    assert [written.has(shard) for shard in range(3)] == [True, True, False]
    assert not replace(written, digest="d2").has(0)
    with pytest.raises(DataError, match=r"shard-00000\.npz cannot be read \(of another model .*delete it"):
        replace(written, digest="d2").mean(ONE)


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "gone"])
def test_a_damaged_shard_is_named(damage: str, written: Saliences, tmp_path: Path) -> None:
    path = tmp_path / "shard-00001.npz"
    content = bytearray(path.read_bytes())
    value = content.index(np.float64(5.0).tobytes())
    content[value] ^= 1
    path.write_bytes({"cut": content[:-30], "empty": b"", "bit": bytes(content), "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    assert [written.has(0), written.has(1)] == [True, False]
    with pytest.raises(DataError, match=r"shard-00001\.npz cannot be read .*delete it and run the same command again"):
        written.mean(ONE)
