"""Learned gates: what is written, what is not believed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cria_dist.errors import DataError
from cria_dist.records import Site
from cria_dist.store.gates import Gates

ONE, TWO = Site(0), Site(1)


@pytest.fixture
def written(tmp_path: Path) -> Gates:
    gates = Gates(tmp_path / "learn" / "gates.npz", "d1")
    gates.write({ONE: np.arange(4.0), TWO: np.full(6, 5.0)})
    return gates


def test_sites_are_read_back(written: Gates) -> None:
    assert written.there()
    assert written.read(ONE).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert written.read(TWO).tolist() == [5.0] * 6
    assert written.read(TWO).dtype == np.float64


def test_gates_learned_from_something_else_are_not_there(written: Gates) -> None:
    other = replace(written, digest="d2")
    assert not other.there()
    with pytest.raises(DataError, match=r"gates\.npz cannot be read \(learned from something else\); delete it"):
        other.read(ONE)


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "gone"])
def test_a_damaged_file_is_named(damage: str, written: Gates) -> None:
    content = bytearray(written.path.read_bytes())
    content[content.index(np.float64(5.0).tobytes())] ^= 1
    whole = written.path.read_bytes()
    written.path.write_bytes({"cut": whole[:-30], "empty": b"", "bit": bytes(content), "gone": b""}[damage])
    if damage == "gone":
        written.path.unlink()
    assert not written.there()
    with pytest.raises(DataError, match=r"gates\.npz cannot be read .*delete it and run the same command again"):
        written.read(TWO)
