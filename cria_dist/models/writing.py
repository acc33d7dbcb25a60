"""Checkpoints are written: weight files, the index, what goes with them; ``config.json`` last."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cria_dist.files import write_json, write_with
from cria_dist.models import checkpoint
from cria_dist.models.names import own_names, rotation_of_old
from cria_dist.models.remote_code import with_modeling_file

SIDE_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")


def _write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one weight file atomically."""
    write_with(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def finish(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Complete a checkpoint whose weight files are written: index, tokenizer and side files, ``config.json`` last."""
    if (source / checkpoint.INDEX).is_file():
        _write_index(target, [file for file in checkpoint.weight_files(source) if (target / file).is_file()])
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in {"config.json", checkpoint.INDEX, checkpoint.PLAN}:
                shutil.copyfile(path, target / path.name)
    named = own_names(with_modeling_file(target, config))
    write_json(target / "config.json", {**rotation_of_old(config), **named})


def write_like(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write new values for the tensors of a checkpoint in the same files and data types.

    Args:
        source: checkpoint whose layout, config and side files are taken over.
        target: folder to fill.
        state: tensors by name; names the source does not store (tied copies) are left out.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file, names in checkpoint.weight_files(source).items():
        with checkpoint.opened(source / file) as handle:
            dtypes = {name: handle.get_tensor(name).dtype for name in names}
        tensors = {name: state[name].detach().to("cpu", dtypes[name]).contiguous() for name in names}
        _write_file(target / file, tensors)
    finish(source, target, checkpoint.read_config(source))


def _write_index(target: Path, files: list[str]) -> None:
    locations: dict[str, str] = {}
    total = 0
    for file in files:
        with safe_open(target / file, framework="pt") as handle:
            locations |= dict.fromkeys(handle.keys(), file)
        total += (target / file).stat().st_size
    write_json(target / checkpoint.INDEX, {"metadata": {"total_size": total}, "weight_map": locations})
