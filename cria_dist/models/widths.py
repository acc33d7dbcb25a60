"""Layers of different widths in a stock class: their maps get their sizes when the model is built."""

from typing import Any

import torch
from transformers import PreTrainedModel

from cria_dist.models.mlp import PER_LAYER, MlpFamily, ModelDict, layers_differ


def resize_layers(model: PreTrainedModel, family: MlpFamily, config: ModelDict) -> None:
    """Give every layer the units that the config says; a model whose layers are alike stays as it is.

    Attention modules read their number of heads off the maps, and query heads per group are the same everywhere.

    Args:
        model: a model just built, its weights without values yet.
        family: its adapter.
        config: its config.json.
    """
    if not layers_differ(config):
        return
    built = family.widths({key: value for key, value in config.items() if key not in PER_LAYER}, family.parts)
    for site, width in family.widths(config, family.parts).items():
        modules = family.modules(site)
        for name in modules.inputs.values():
            _replace(model, name, "out_features", width, built[site])
        _replace(model, modules.output, "in_features", width, built[site])


def resizing_class(stock: type[PreTrainedModel], family: MlpFamily, config: ModelDict) -> type[PreTrainedModel]:
    """A class that ``from_pretrained`` can fill: the stock one, its layers resized as soon as they are there."""

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        resize_layers(self, family, config)

    return type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})


def _replace(model: PreTrainedModel, name: str, side: str, width: int, built: int) -> None:
    """A map with ``width`` units in place of the ``built`` ones it has on one side."""
    old = model.get_submodule(name)
    if not isinstance(old, torch.nn.Linear):
        raise TypeError(f"{name} of {type(model).__name__} is no linear map")
    sizes = {"in_features": old.in_features, "out_features": old.out_features}
    sizes[side] = sizes[side] // built * width
    biased = "bias" in dict(old.named_parameters(recurse=False))
    new = torch.nn.Linear(**sizes, bias=biased, device=old.weight.device, dtype=old.weight.dtype)
    model.set_submodule(name, new)
