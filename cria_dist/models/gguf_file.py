"""A checkpoint as one GGUF file, which llama.cpp and what is built on it load; no value is rounded."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cria_dist.errors import ConfigError
from cria_dist.files import write_with
from cria_dist.models import checkpoint
from cria_dist.models.gguf_layout import Layout, layout_of
from cria_dist.models.gguf_tensors import outgoing
from cria_dist.models.gguf_tokenizer import describe_tokenizer, read_tokenizer
from cria_dist.models.shapes import Stored, stored_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

INSTALL = "pip install 'cria-dist[export]'"
DIVISORS = "rope_freqs.weight"
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
"""GGUF's word for a file, by the data type of its matrices."""
ITEM = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""What a value is written as; bfloat16 as its 16-bit words."""


def write_gguf(directory: Path, target: Path, float32: bool = False) -> Layout:
    """Write a checkpoint as GGUF, one tensor in memory at a time; the file is whole or not there.

    Matrices keep their data type; vectors (norms and biases) become float32.

    Args:
        directory: the checkpoint.
        target: the file.
        float32: write every matrix as float32, which also computes in float32.

    Returns:
        How llama.cpp sees it.

    Raises:
        ConfigError: the package ``gguf`` is missing, or llama.cpp does not know such a model or tokenizer.
    """
    if find_spec("gguf") is None:
        raise ConfigError(f"the GGUF export needs the package gguf, which is not installed; {INSTALL}")
    layout, stored = check_gguf(directory), stored_tensors(directory)
    if float32:
        stored = {name: Stored(tensor.shape, "F32") for name, tensor in stored.items()}
    write_with(target, lambda temporary: _write(directory, layout, stored, temporary))
    return layout


def check_gguf(directory: Path) -> Layout:
    """How llama.cpp sees a checkpoint, by its headers alone; names of tensors are looked up where ``gguf`` is there.

    Raises:
        ConfigError: llama.cpp does not know such weights, such a model or such a tokenizer.
    """
    stored = stored_tensors(directory)
    odd = sorted({one.dtype for one in stored.values()} - FILE_TYPES.keys())
    if odd:
        raise ConfigError(f"weights of type {odd[0]} have no GGUF export; save the checkpoint in bfloat16")
    layout = layout_of(checkpoint.read_config(directory))
    read_tokenizer(directory)
    if find_spec("gguf") is not None:
        outgoing(layout, stored)
    return layout


def _write(directory: Path, layout: Layout, stored: Mapping[str, Stored], path: Path) -> None:
    import gguf

    tensors, divisors = outgoing(layout, stored), layout.frequency_divisors()
    writer = gguf.GGUFWriter(path, layout.architecture)
    try:
        largest = max(tensors, key=lambda tensor: math.prod(tensor.like.shape))
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[largest.like.dtype]])
        layout.describe(writer)
        describe_tokenizer(directory, layout.config.vocab_size, writer)
        if divisors is not None:
            _announce(writer, DIVISORS, Stored(divisors.shape, "F32"))
        for tensor in tensors:
            _announce(writer, tensor.called, tensor.like)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors.numpy())
        with checkpoint.open_tensors(directory) as reader:
            for tensor in tensors:
                writer.write_tensor_data(_words(tensor.made(reader.read), _written(tensor.like)))
    finally:
        writer.close()


def _announce(writer: "GGUFWriter", called: str, tensor: Stored) -> None:
    import gguf

    dtype = _written(tensor)
    item, kind = np.dtype(ITEM[dtype]), gguf.GGMLQuantizationType[dtype]
    writer.add_tensor_info(called, tensor.shape, item, math.prod(tensor.shape) * item.itemsize, raw_dtype=kind)


def _written(tensor: Stored) -> str:
    """The data type it goes out in; llama.cpp wants vectors in float32."""
    return "F32" if len(tensor.shape) == 1 else tensor.dtype


def _words(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """The values as they are written."""
    tensor = (tensor.float() if dtype == "F32" else tensor).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype == "BF16" else tensor.numpy()
