"""Dimensions of the residual stream as units: one of them runs through the whole model, so all layers keep the same.

Every layer reads the stream twice, in front of its attention and in front of its MLP, each time through a norm. The two
readings are sites of their own: they are recorded, scored and repaired one by one, and what stays is decided for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cria_dist.models import attention
from cria_dist.records import Site

UNIT = "residual"
"""What ``prune.units`` calls them."""
PARTS = ("residual_attention", "residual_mlp")
"""Parts of a layer that read the stream."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose layers read the stream through RMSNorms and write to it without one."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Modules of one site.

    Attributes:
        norm: what the stream goes through.
        readers: linear maps with columns of the dimensions.
        writer: linear map with rows of them.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str


def reading(layers: str, site: Site) -> Reading:
    """Modules of one site, under Llama's names."""
    prefix = f"{layers}.{site.layer}"
    if site.part == PARTS[0]:
        readers = tuple(f"{prefix}.self_attn.{name}_proj" for name in "qkv")
        return Reading(f"{prefix}.input_layernorm", readers, f"{prefix}.self_attn.o_proj")
    readers = tuple(f"{prefix}.mlp.{name}_proj" for name in ("gate", "up"))
    return Reading(f"{prefix}.post_attention_layernorm", readers, f"{prefix}.mlp.down_proj")


def sites(config: Mapping[str, Any]) -> dict[Site, int]:
    """Dimensions of the stream at every place where it is read."""
    layers = range(int(config["num_hidden_layers"]))
    return {Site(layer, part): int(config["hidden_size"]) for layer in layers for part in PARTS}


def coupled(layers: str, site: Site, config: Mapping[str, Any], writer_bias: bool) -> dict[str, int]:
    """Tensors that carry the dimensions, and where these lie; the embedding goes with the first, the end with the last.

    Args:
        layers: name of the list of layers.
        site: one reading.
        config: the model's config.json.
        writer_bias: whether the map that writes has a bias.
    """
    modules, base = reading(layers, site), layers.rpartition(".")[0]
    tensors = {f"{modules.norm}.weight": 0, f"{modules.writer}.weight": 0}
    tensors |= {f"{name}.weight": 1 for name in modules.readers}
    if writer_bias:
        tensors[f"{modules.writer}.bias"] = 0
    if site == Site(0, PARTS[0]):
        tensors[f"{base}.embed_tokens.weight"] = 1
    if is_last(site, config):
        tensors |= {f"{base}.norm.weight": 0, "lm_head.weight": 1}  # a tied head is stored as the embedding
    return tensors


def norms(layers: str, site: Site, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Weights of the norms that the stream goes through at a site; the final one with the last."""
    final = (f"{layers.rpartition('.')[0]}.norm.weight",) if is_last(site, config) else ()
    return (f"{reading(layers, site).norm}.weight", *final)


def solved(layers: str, site: Site, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that the repair replaces."""
    return (*norms(layers, site, config), *(f"{name}.weight" for name in reading(layers, site).readers))


def is_last(site: Site, config: Mapping[str, Any]) -> bool:
    """Whether nothing but the final norm and the head reads the stream after it."""
    return site == Site(int(config["num_hidden_layers"]) - 1, PARTS[1])


def unit_cost(site: Site, config: Mapping[str, Any], writer_bias: bool, embedding: bool = True) -> int:
    """Parameters that leave at a site with one dimension; its multiplications per position without ``embedding``."""
    shape, vocabulary = attention.attention_shape(config), int(config["vocab_size"])
    maps = shape.unit_weights // shape.hidden * shape.groups[site.layer]
    cost = maps if site.part == PARTS[0] else 3 * int(config["intermediate_size"])
    if not embedding:
        return cost + vocabulary * is_last(site, config)
    cost += 1 + writer_bias + vocabulary * (site == Site(0, PARTS[0]))
    return cost + is_last(site, config) * (1 + vocabulary * (not config.get("tie_word_embeddings")))


def narrowed(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The config of a model with fewer dimensions; heads keep their width, which is no share of theirs any more."""
    shape = attention.attention_shape(config)
    narrow = {**config, "hidden_size": width, "head_dim": shape.head_dim}
    return attention.with_groups(narrow, list(shape.groups))
