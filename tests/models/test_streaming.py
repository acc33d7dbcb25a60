"""Weight files written piece by piece: the bytes of safetensors, whole or not at all, in little memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.models import streaming
from cria_dist.models.streaming import Piece, WindowReader, in_memory, write_pieces

TENSORS = {
    "b": torch.randn(3, 4).bfloat16(),
    "a": torch.randn(2, 5, 1),
    "é": torch.arange(4),
    "half": torch.randn(7).half(),
    "scalar": torch.tensor(3.0),
    "odd": torch.arange(3, dtype=torch.uint8),
    "yes": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    for number, names in enumerate([list(TENSORS), ["a"], ["b", "a"]]):
        tensors = {name: TENSORS[name] for name in names}
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        write_pieces(tmp_path / "ours", {name: in_memory(tensor) for name, tensor in tensors.items()})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes(), number


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    write_pieces(tmp_path / "ours", {"turned": in_memory(matrix.T), "part": in_memory(matrix[:, 1:3])})
    found = load_file(tmp_path / "ours")
    assert found["turned"].equal(matrix.T.contiguous())
    assert found["part"].equal(matrix[:, 1:3].contiguous())


def test_a_piece_that_is_not_what_was_announced_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="w was announced"):
        write_pieces(tmp_path / "ours", {"w": Piece(torch.zeros(3, device="meta"), lambda: torch.zeros(4))})
    assert not list(tmp_path.iterdir())


def test_a_file_is_opened_again_when_its_window_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 16)
    save_file(TENSORS, tmp_path / "file")
    opened: list[Path] = []
    original = streaming.safe_open
    monkeypatch.setattr(streaming, "safe_open", lambda path, **how: opened.append(path) or original(path, **how))
    reader = WindowReader(tmp_path / "file")
    assert all(reader.like(name).shape == tensor.shape for name, tensor in TENSORS.items())
    assert opened == [tmp_path / "file"]
    assert all(reader.read(name).equal(tensor) for name, tensor in TENSORS.items())
    assert len(opened) > 3
