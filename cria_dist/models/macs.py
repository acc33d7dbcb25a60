"""How many multiplications a model makes, from its shapes alone."""

from typing import cast

import torch
from transformers.pytorch_utils import Conv1D

from cria_dist.models import checkpoint
from cria_dist.models.experts import weights_met
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.models.sizes import sizes_of

MAPS = (torch.nn.Linear, Conv1D)
"""What computes a linear map; of the second kind the weight is transposed."""


def macs_per_position(config: ModelDict, family: MlpFamily, length: int) -> int:
    """Multiply-accumulates of one position of a sequence: all linear maps, the head too, and full T x T attention.

    Args:
        config: the model's config.json.
        family: its adapter.
        length: positions of the sequence; every position attends to all of them.
    """
    maps = (module for module in checkpoint.empty_model(config).modules() if isinstance(module, MAPS))
    sizes, routed = sizes_of(config, family), sum(weights_met(family, config).values())
    attention = 2 * len(sizes.layers) * length * sizes.heads * sizes.head_dim
    return sum(one.weight.numel() for one in maps) + routed + attention


def macs_of_layers(config: ModelDict, family: MlpFamily, length: int) -> list[int]:
    """Multiply-accumulates of one position of a sequence in every layer, as :func:`macs_per_position` counts them."""
    layers = cast(torch.nn.ModuleList, checkpoint.empty_model(config).get_submodule(family.layers))
    heads, routed = sizes_of(config, family), weights_met(family, config)
    attention = 2 * length * heads.heads * heads.head_dim
    maps = [sum(one.weight.numel() for one in layer.modules() if isinstance(one, MAPS)) for layer in layers]
    return [attention + count + routed.get(layer, 0) for layer, count in enumerate(maps)]
