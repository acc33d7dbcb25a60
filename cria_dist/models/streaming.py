"""Weight files written tensor by tensor: what is in memory is two tensors and a window of their file.

``safetensors`` itself wants every tensor of a file at hand. The bytes are those it would write.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from cria_dist.files import write_with

WINDOW_BYTES = 512 << 20
"""Of a mapped file that may stay resident; opening it again lets go of them."""
AHEAD_BYTES = 256 << 20
"""Of the file that the system is asked to read on; the tensors of a file are read in about their order there."""
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of data types, in the order in which tensors of them stand in a file."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to be written.

    Attributes:
        like: its shape and data type, on the meta device.
        make: gives its values when they are wanted.
    """

    like: torch.Tensor
    make: Callable[[], torch.Tensor]


def in_memory(tensor: torch.Tensor) -> Piece:
    """A tensor that is there already."""
    return Piece(tensor.to("meta"), lambda: tensor)


class WindowReader:
    """Reads tensors of one file; of the mapped file about ``WINDOW_BYTES`` stay in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: Any = None
        self._read_bytes = self._position = 0

    def like(self, name: str) -> torch.Tensor:
        """Shape and data type of a tensor, on the meta device; nothing is read."""
        return self._opened().get_tensor(name).to("meta")

    def read(self, name: str) -> torch.Tensor:
        """A tensor; a view of the mapped file."""
        if self._read_bytes > WINDOW_BYTES:
            self.close()
        tensor: torch.Tensor = self._opened().get_tensor(name)
        self._ask_ahead()
        self._read_bytes += tensor.nbytes
        self._position += tensor.nbytes
        return tensor

    def _ask_ahead(self) -> None:
        """Let the system read on: a mapped file is else read by the page, at two thirds of the speed."""
        if sys.platform == "linux":
            with self._path.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), self._position, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Let go of the file."""
        self._handle, self._read_bytes = None, 0

    def _opened(self) -> Any:
        if self._handle is None:
            self._handle = safe_open(self._path, framework="pt")
        return self._handle


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write one weight file, whole or not at all; pieces are made one after the other."""
    write_with(path, lambda temporary: _write(temporary, pieces))


def file_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Names of tensors in the order in which they stand in a file, and are made."""
    order = list(DTYPES)
    return sorted(dtypes, key=lambda name: (order.index(dtypes[name]), name))


def _write(path: Path, pieces: Mapping[str, Piece]) -> None:
    names = file_order({name: piece.like.dtype for name, piece in pieces.items()})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        like = pieces[name].like
        start, end = end, end + like.nbytes
        header[name] = {"dtype": DTYPES[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        with ThreadPoolExecutor(max_workers=1) as ahead:  # the next piece is made while one is written
            made = [ahead.submit(pieces[name].make) for name in names[:1]]
            for name, after in zip(names, [*names[1:], None], strict=True):
                tensor = made.pop().result().contiguous()
                if after is not None:
                    made.append(ahead.submit(pieces[after].make))
                _write_values(handle, name, pieces[name], tensor)


def _write_values(handle: BinaryIO, name: str, piece: Piece, tensor: torch.Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (piece.like.shape, piece.like.dtype):
        raise ValueError(f"{name} was announced as {piece.like.shape} and made as {tensor.shape}")
    handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
