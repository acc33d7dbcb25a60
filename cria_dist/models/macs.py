"""How many multiplications a model makes, from its shapes alone."""

from typing import cast

import torch
from transformers.pytorch_utils import Conv1D

from cria_dist.models import checkpoint
from cria_dist.models.attention import LAYER_KV_HEADS
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
    routed, attention = sum(weights_met(family, config).values()), sum(_attention_macs(config, family, length))
    return sum(one.weight.numel() for one in maps) + routed + attention


def macs_of_layers(config: ModelDict, family: MlpFamily, length: int) -> list[int]:
    """Multiply-accumulates of one position of a sequence in every layer, as :func:`macs_per_position` counts them."""
    layers = cast(torch.nn.ModuleList, checkpoint.empty_model(config).get_submodule(family.layers))
    routed, attention = weights_met(family, config), _attention_macs(config, family, length)
    maps = [sum(one.weight.numel() for one in layer.modules() if isinstance(one, MAPS)) for layer in layers]
    return [attention[layer] + count + routed.get(layer, 0) for layer, count in enumerate(maps)]


def _attention_macs(config: ModelDict, family: MlpFamily, length: int) -> list[int]:
    """Of the scores and mixtures of one position in every layer, whose heads may have left."""
    sizes = sizes_of(config, family)
    groups = config.get(LAYER_KV_HEADS) or [sizes.kv_heads] * len(sizes.layers)
    return [2 * length * (count * sizes.heads // sizes.kv_heads) * sizes.head_dim for count in groups]
