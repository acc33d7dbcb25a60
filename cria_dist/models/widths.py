"""Layers of different widths in a stock class: their maps get their sizes when the model is built."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cria_dist.models import attention
from cria_dist.models.mlp import PER_LAYER, MlpFamily, ModelDict, layers_differ


def resize_layers(model: PreTrainedModel, family: MlpFamily, config: ModelDict) -> None:
    """Give every layer the units that the config says; a model whose layers are alike stays as it is.

    Query heads per group are the same everywhere.

    Args:
        model: a model just built, its weights without values yet.
        family: its adapter.
        config: its config.json.
    """
    if not layers_differ(config):
        return
    built = family.widths(alike(config), family.parts)
    for site, width in family.widths(config, family.parts).items():
        if width == built[site]:
            continue
        modules = family.modules(site)
        for name in modules.inputs.values():
            _replace(model, name, "out_features", width, built[site])
        _replace(model, modules.output, "in_features", width, built[site])
        for name in modules.norms:
            norm: Any = model.get_submodule(name)
            norm.weight = torch.nn.Parameter(norm.weight.new_empty(len(norm.weight) // built[site] * width))
        if site.part == attention.PART:
            queries = attention.attention_shape(config).queries
            tell_heads(model.get_submodule(modules.output.rpartition(".")[0]), width, queries)


def alike(config: ModelDict) -> dict[str, Any]:
    """The config that the stock class goes by: every layer as wide as the widest, with the dense model's heads."""
    return {key: value for key, value in config.items() if key not in PER_LAYER}


def tell_heads(attention: Any, groups: int, queries: int) -> None:
    """Give an attention module its numbers of heads where it keeps them and does not read them off its maps."""
    heads = groups * queries
    if hasattr(attention, "split_size"):  # where GPT-2 cuts queries, keys and values
        attention.split_size = heads * attention.head_dim
    if hasattr(attention, "qkv_proj"):  # Phi-3 asks its config where to cut them
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = heads
    for name, count in (("num_heads", heads), ("num_key_value_heads", groups)):
        if hasattr(attention, name):
            setattr(attention, name, count)


def resizing_class(stock: type[PreTrainedModel], family: MlpFamily, config: ModelDict) -> type[PreTrainedModel]:
    """A class that ``from_pretrained`` can fill: the stock one, its layers resized as soon as they are there."""

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        resize_layers(self, family, config)

    return type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})


def _replace(model: PreTrainedModel, name: str, side: str, width: int, built: int) -> None:
    """A map with ``width`` units in place of the ``built`` ones it has on one side."""
    old = model.get_submodule(name)
    if isinstance(old, Conv1D):
        sizes = {"in_features": old.nx, "out_features": old.nf}
    elif isinstance(old, torch.nn.Linear):
        sizes = {"in_features": old.in_features, "out_features": old.out_features}
    else:
        raise TypeError(f"{name} of {type(model).__name__} is no linear map")
    sizes[side] = sizes[side] // built * width
    model.set_submodule(name, _map_like(old, **sizes))


def _map_like(old: torch.nn.Linear | Conv1D, in_features: int, out_features: int) -> torch.nn.Module:
    """A map of other sizes, as the old one in everything else."""
    if isinstance(old, Conv1D):
        with old.weight.device:
            return Conv1D(out_features, in_features).to(old.weight.dtype)
    biased = "bias" in dict(old.named_parameters(recurse=False))
    return torch.nn.Linear(in_features, out_features, biased, old.weight.device, old.weight.dtype)
