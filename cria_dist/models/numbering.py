"""Whether a layer computes the same under another number: layers that stay when others go are numbered anew."""

from typing import Any, cast

import torch

from cria_dist.models import checkpoint, depth
from cria_dist.models.mlp import MlpFamily, ModelDict

NUMBERS = ("layer_idx", "layer_id", "layer_number")
"""What layers call their own number, which they index the cache by."""
INVERSE = "scale_attn_by_inverse_layer_idx"
"""With this, GPT-2 divides by the number where it attends: no module holds the quotient."""
Plain = int | float | str | None


def computed_from_number(config: ModelDict, family: MlpFamily) -> str:
    """What of a layer depends on its number: DiffLlama's ``self_attn.lambda_init``, say; empty if nothing does.

    Held against each other, without weights: the layers of the model, and of the model without its first layer.

    Args:
        config: config.json of a model of two layers or more.
        family: adapter of its family.
    """
    if config.get(INVERSE):
        return INVERSE
    count = int(config["num_hidden_layers"])
    before = _layers(config, family)[1:]
    after = _layers(depth.shallower(config, tuple(range(1, count)), family.width_key), family)
    for old, new in zip(before, after, strict=True):
        for (name, one), (_, other) in zip(old.named_modules(), new.named_modules(), strict=True):
            if type(one) is not type(other):
                return name
            ours, theirs = _plain(one), _plain(other)
            if odd := [key for key in ours if ours[key] != theirs.get(key)]:
                return f"{name}.{odd[0]}".removeprefix(".")
    return ""


def _layers(config: ModelDict, family: MlpFamily) -> list[torch.nn.Module]:
    return list(cast(torch.nn.ModuleList, checkpoint.empty_model(config).get_submodule(family.layers)))


def _plain(module: torch.nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in NUMBERS and isinstance(value, Plain)}
