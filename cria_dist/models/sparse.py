"""Sparse weights inside safetensors: the nonzero values of a tensor, and a bit for every place.

A sparse tensor ``w`` is stored as ``w.values`` (its entries that are not zero, in row-major order, in its data type)
and ``w.places`` (uint8, one bit per entry of the flattened tensor, the first entry is the highest bit of the first
byte; 1 where there is a value). Its shape is in the file's metadata: ``sparse`` is a JSON object from names to shapes.
Every other tensor is stored as it is. A float32 tensor with half its entries zero takes 53 % of its bytes.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cria_dist.errors import DataError
from cria_dist.files import write_with

SUFFIX = ".sparse.safetensors"
VALUES, PLACES = ".values", ".places"


def write_sparse(source: Path, target: Path, names: Collection[str]) -> None:
    """Write the tensors of a safetensors file, those in ``names`` sparse (names the file lacks are no matter)."""
    shapes: dict[str, list[int]] = {}
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118  (not a dict)
            tensor = handle.get_tensor(name)
            if name not in names:
                tensors[name] = tensor
                continue
            there = (tensor != 0) | torch.signbit(tensor)  # a negative zero is a value too: expanded to the bit
            tensors[name + VALUES] = tensor[there]
            tensors[name + PLACES] = torch.from_numpy(np.packbits(there.numpy()))
            shapes[name] = list(tensor.shape)
    metadata = {"sparse": json.dumps(shapes, sort_keys=True)}  # one entry: of several, the order would be by chance
    write_with(target, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_sparse(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file that :func:`write_sparse` wrote, expanded to what they were, bit for bit.

    Raises:
        DataError: the file is missing or damaged, or holds no sparse tensors.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dict)
            shapes: dict[str, list[int]] = json.loads((handle.metadata() or {})["sparse"])
        for name, shape in shapes.items():
            values, places = stored.pop(name + VALUES), stored.pop(name + PLACES)
            there = np.unpackbits(places.numpy(), count=math.prod(shape)).astype(bool)
            expanded = torch.zeros(math.prod(shape), dtype=values.dtype)
            expanded[torch.from_numpy(there)] = values
            stored[name] = expanded.reshape(shape)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} cannot be expanded ({error}); delete it and run the same command again") from error
    return stored
