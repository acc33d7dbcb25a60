"""A model in which some neurons exist twice: a good criterion removes the copies, and a repair makes that free."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cria_dist.models import checkpoint
from cria_dist.models.family import family_of

SEED = 0


def widen(dense: Path, target: Path, copies: int) -> float:
    """Write a checkpoint that computes the same with random neurons doubled and their output weights halved.

    Args:
        dense: a checkpoint whose layers have the same width.
        target: folder to write.
        copies: neurons of every layer that get a copy.

    Returns:
        The share of the wider layers that the copies are.
    """
    config = checkpoint.read_config(dense)
    family, rng = family_of(config), np.random.default_rng(SEED)
    tensors = {
        name: tensor for file in checkpoint.weight_files(dense) for name, tensor in load_file(dense / file).items()
    }
    widths = family.widths(config)
    for site, width in widths.items():
        chosen = torch.from_numpy(np.sort(rng.choice(width, copies, replace=False)))
        order = torch.from_numpy(rng.permutation(width + copies))  # a copy must not be known by its place
        for name, dim in family.coupled_tensors(site, config).items():
            tensor = tensors[name]
            if dim == 1:
                tensor = tensor.clone()
                tensor[:, chosen] /= 2  # exact: a power of two
            tensors[name] = (
                torch.cat([tensor, tensor.index_select(dim, chosen)], dim).index_select(dim, order).contiguous()
            )
    target.mkdir(parents=True, exist_ok=True)
    for file in dense.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and "index" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    wider = min(widths.values()) + copies
    (target / "config.json").write_text(json.dumps({**config, "intermediate_size": wider}, indent=2))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return copies / wider
