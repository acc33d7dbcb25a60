"""Sparse storage: expanded to the bit, smaller, damage is found out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.errors import DataError
from cria_dist.models.sparse import read_sparse, write_sparse


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(30, 41, generator=generator)
    half = torch.where(torch.rand(30, 41, generator=generator) < 0.5, dense, 0.0)
    return {
        "dense": dense,
        "half": half,
        "words": half.to(torch.bfloat16),
        "short": torch.tensor([0.0, 1.5, 0.0]),
        "zero": torch.zeros(3, 4),
        "odd": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 0.0]),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_what_is_stored_by_hand(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "w.safetensors")
    write_sparse(tmp_path / "w.safetensors", tmp_path / "s.safetensors", {"short", "another"})
    stored = load_file(tmp_path / "s.safetensors")
    assert stored["short.values"].tolist() == [1.5]
    assert stored["short.places"].tolist() == [0b01000000]
    assert stored["half"].equal(tensors()["half"])  # not named: as it is


def test_it_expands_to_the_same_bits_and_is_smaller(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "w.safetensors")
    write_sparse(tmp_path / "w.safetensors", tmp_path / "s.safetensors", tensors().keys() - {"dense"})
    expanded = read_sparse(tmp_path / "s.safetensors")
    assert expanded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert expanded[name].shape == tensor.shape
        assert expanded[name].dtype == tensor.dtype
        assert bits(expanded[name]) == bits(tensor), name
    stored = load_file(tmp_path / "s.safetensors")
    count = int((tensors()["half"] != 0).sum())
    assert stored["half.values"].nbytes + stored["half.places"].nbytes == 4 * count + 154  # 1230 bits


def test_damage_and_files_of_another_kind_are_found_out(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "w.safetensors")
    write_sparse(tmp_path / "w.safetensors", tmp_path / "s.safetensors", {"half"})
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    lost = load_file(tmp_path / "s.safetensors")
    lost["half.values"] = lost["half.values"][1:].clone()
    save_file(lost, tmp_path / "lost.safetensors", metadata={"sparse": '{"half": [30, 41]}'})
    for name in ("cut", "lost", "w", "none"):
        with pytest.raises(DataError, match=rf"{name}.safetensors cannot be expanded"):
            read_sparse(tmp_path / f"{name}.safetensors")
