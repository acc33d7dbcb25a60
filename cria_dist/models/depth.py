"""Whole layers as units: which of them stay, what the config says of those, and what their tensors are called.

A plan that removes layers has one site per layer, ``layer-003.block``, with the kept units ``(0,)`` or ``()``. The
layers that stay are numbered anew from 0: the KV cache is indexed by that number.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from transformers import AutoConfig

from cria_dist.errors import PlanError
from cria_dist.models import attention
from cria_dist.models.experts import EVERY, PLAIN_LAYERS, has_experts
from cria_dist.models.mlp import LAYER_WIDTHS, ModelDict
from cria_dist.records import Site

PART = "block"
"""Part of a site whose one unit is the layer itself."""
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", LAYER_WIDTHS, attention.LAYER_KV_HEADS)
"""Keys of config.json with one entry per layer."""

Value = TypeVar("Value")
Kept = Mapping[str, tuple[int, ...]]


def layer_sites(config: ModelDict) -> tuple[Site, ...]:
    """The layers of a model, as sites."""
    return tuple(Site(layer, PART) for layer in range(int(config["num_hidden_layers"])))


def removes_layers(kept: Kept) -> bool:
    """Whether a plan speaks of whole layers."""
    return any(key.endswith(f".{PART}") for key in kept)


def within_layers(kept: Kept) -> Kept:
    """The part of a plan that removes units inside layers."""
    return {key: units for key, units in kept.items() if not key.endswith(f".{PART}")}


def surviving(kept: Kept, config: ModelDict) -> tuple[int, ...]:
    """The layers that stay, in the model's numbering: all of them if the plan does not speak of layers.

    Raises:
        PlanError: the plan has other layers than the model, leaves none, or leaves more than one unit of a layer.
    """
    layers = {site.key: site.layer for site in layer_sites(config)}
    if not removes_layers(kept):
        return tuple(layers.values())
    planned = {key: units for key, units in kept.items() if key.endswith(f".{PART}")}
    odd = sorted(planned.keys() ^ layers.keys()) or [key for key, units in planned.items() if units not in ((0,), ())]
    if odd or not any(planned.values()):
        where = odd[0] if odd else "no layer is left"
        raise PlanError(f"the plan does not fit the model's {len(layers)} layers ({where}); decide again")
    return tuple(layer for key, layer in layers.items() if planned[key])


def shallower(config: ModelDict, stay: tuple[int, ...], width_key: str = "intermediate_size") -> dict[str, Any]:
    """The config with these layers only.

    What transformers derives from a layer's number (sliding or full attention, where config.json does not list it;
    experts or a plain MLP) is written down, for the numbers change.
    """
    if len(stay) == int(config["num_hidden_layers"]):
        return dict(config)
    parsed = AutoConfig.for_model(**config)
    lists = {key: getattr(parsed, key, None) for key in PER_LAYER}
    chosen: dict[str, Any] = {
        key: [values[layer] for layer in stay] for key, values in lists.items() if values is not None
    }
    if widths := chosen.get(LAYER_WIDTHS):
        chosen[width_key] = max(widths)
        if len(set(widths)) == 1:  # then the stock class has a name for it
            config = {key: value for key, value in config.items() if key != LAYER_WIDTHS}
            chosen.pop(LAYER_WIDTHS)
    if hasattr(parsed, PLAIN_LAYERS):
        chosen[PLAIN_LAYERS] = [number for number, layer in enumerate(stay) if not has_experts(config, layer)]
        chosen[EVERY] = 1
    fewer = {**config, "num_hidden_layers": len(stay), **chosen}
    groups = fewer.get(attention.LAYER_KV_HEADS)
    return attention.with_groups(fewer, groups) if groups else fewer


def renumbered(tensors: Mapping[str, Value], prefix: str, stay: tuple[int, ...]) -> dict[str, Value]:
    """What belongs to the layers that stay (under their new numbers) or to no layer.

    Args:
        tensors: anything by tensor name.
        prefix: what the names of a layer's tensors begin with, before its number: ``model.layers.``
        stay: layers that stay, in the old numbering.
    """
    new = {layer: number for number, layer in enumerate(stay)}
    found: dict[str, Value] = {}
    for name, value in tensors.items():
        old, dot, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            found[name] = value
        elif int(old) in new:
            found[f"{prefix}{new[int(old)]}{dot}{rest}"] = value
    return found
