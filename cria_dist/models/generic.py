"""Decoders without an adapter of their own that follow Llama's names for a gated MLP, recognised by their modules.

Some of those whose attention has Llama's names too, and nothing in between but a norm over all heads, can lose heads.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cria_dist.models import attention, residual
from cria_dist.models.decoders import GatedMlpFamily
from cria_dist.models.mlp import PART, ModelDict
from cria_dist.models.names import parsed
from cria_dist.models.residual import BIASED, Stream
from cria_dist.records import Site

NORMED_HEADS = ("olmo2", "olmo3")
"""Families with an RMSNorm over all query heads and one over all heads of keys, which count those that are left."""
WITH_HEADS = ("cohere", "ernie4_5", "granite", "helium", "seed_oss", "smollm3", "stablelm", *NORMED_HEADS)
"""Families whose attention computes the same with fewer heads; modules alone do not show it."""
HEADS_STAY = (
    "self_attn must be q_proj, k_proj, v_proj and o_proj alone where a family has no adapter of its own, and that one "
    f"of {', '.join(WITH_HEADS)}"
)
BEHIND = Stream((), ("post_attention_layernorm", "post_feedforward_layernorm"), output_bias="attention_bias")
STREAMS: Mapping[str, Stream] = {
    "ernie4_5": Stream(output_bias="use_bias"),
    "granite": replace(BIASED, scaled=True),
    "olmo2": BEHIND,
    "olmo3": BEHIND,
    "seed_oss": Stream(output_bias="attention_out_bias"),
    "smollm3": BIASED,
}
"""Those whose layers read the residual stream and write to it in a known way."""
MORE_THAN_STACKED = ("hidden_size_per_layer_input", "num_kv_shared_layers")
"""Keys of config.json: layers read the tokens again, or the keys and values of earlier layers."""
Modules = Mapping[str, torch.nn.Module]


@dataclass(frozen=True, slots=True)
class GenericFamily(GatedMlpFamily):
    """A decoder whose MLPs are ``gate_proj``, ``up_proj`` and ``down_proj`` in every layer; only they are known.

    Attributes:
        biased: whether these maps carry biases.
        stream_stays: why dimensions of the residual stream cannot go.
    """

    biased: bool = False
    stream_stays: str = ""

    parts = (PART,)

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """Whether the maps carry biases."""
        return self.biased if part == PART else GatedMlpFamily.has_bias(self, config, part)

    def obstacle(self, part: str) -> str:
        """Why the units of a part cannot go."""
        return {attention.PART: HEADS_STAY, residual.UNIT: self.stream_stays}.get(part, "")


@dataclass(frozen=True, slots=True)
class GenericHeadsFamily(GenericFamily):
    """One whose attention is ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` in every layer, and no other map."""

    parts = (attention.PART, PART)


@dataclass(frozen=True, slots=True)
class GenericNormedHeadsFamily(GenericHeadsFamily):
    """One with an RMSNorm over all query heads, and one over all heads of keys."""

    head_norms = ("self_attn.q_norm", "self_attn.k_norm")


def generic_family(config: ModelDict) -> GenericFamily | None:
    """The adapter for a checkpoint of any model type, if the model's modules have the names, sizes and kinds."""
    return _generic_family(json.dumps(config, sort_keys=True))


@functools.lru_cache
def _generic_family(config_json: str) -> GenericFamily | None:
    config: dict[str, Any] = json.loads(config_json)
    name = str(config.get("model_type"))
    if not {"hidden_size", "intermediate_size", "num_hidden_layers"} <= config.keys() or unlike_layers(config):
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed(config), trust_remote_code=False)
    except (ValueError, KeyError, ImportError):  # transformers has no such model, or none that predicts the next token
        return None
    modules, inner, outer = dict(model.named_modules()), int(config["intermediate_size"]), int(config["hidden_size"])
    kind = GenericNormedHeadsFamily if name in NORMED_HEADS else GenericHeadsFamily
    biased = _biased(kind, PART, config, modules, [(outer, inner), (outer, inner), (inner, outer)])
    if GenericFamily.embedding not in modules or biased is None:
        return None
    shape = attention.attention_shape({key: value for key, value in config.items() if key != attention.LAYER_KV_HEADS})
    across, within = shape.groups[0] * shape.span, shape.groups[0] * shape.head_dim
    sizes = [(outer, across), (outer, within), (outer, within), (across, outer)]
    stream, stays = STREAMS.get(name), _stream_stays(name, modules)
    heads_biased = _biased(kind, attention.PART, config, modules, sizes)
    if name not in WITH_HEADS or heads_biased is None:
        return GenericFamily(name, stream, biased=biased, stream_stays=stays)
    return kind(name, stream, attention_bias=heads_biased, biased=biased, stream_stays=stays)


def unlike_layers(config: ModelDict) -> str:
    """What makes layers more than copies that each read the one before, as in Gemma 3n and 4; empty if nothing does.

    Blocks of such layers cannot be run by themselves, nor the layers be numbered anew.
    """
    try:
        settings = parsed({"model_type": None, **config})
    except (ValueError, KeyError):  # transformers does not know the architecture
        return ""
    keys = [key for key in MORE_THAN_STACKED if getattr(settings, key, 0)]
    return ", ".join([*keys, *sorted(getattr(settings, "per_layer_attributes", None) or ())])


def _biased(
    kind: type[GenericFamily], part: str, config: ModelDict, modules: Modules, sizes: Sequence[tuple[int, int]]
) -> bool | None:
    """Whether the maps of a part have biases (of attention, the input maps); None if it is not the same in all layers.

    Args:
        kind: adapter that names the modules.
        part: of every layer.
        config: the model's config.json.
        modules: the model's.
        sizes: inputs and outputs of the maps that the part must be, and nothing else.
    """
    found: set[bool] = set()
    for layer in range(int(config["num_hidden_layers"])):
        site = kind("").modules(Site(layer, part))
        names = [*site.inputs.values(), site.output]
        maps = [one for name in names if isinstance(one := modules.get(name), torch.nn.Linear)]
        if (
            not _are_all([*names, *site.norms], modules)
            or [(one.in_features, one.out_features) for one in maps] != sizes
        ):
            return None
        found |= {"bias" in dict(one.named_parameters()) for one in (maps if part == PART else maps[:-1])}
    return found.pop() if len(found) == 1 else None


def _stream_stays(name: str, modules: Modules) -> str:
    """Why dimensions of the residual stream cannot go."""
    layer = f"{GenericFamily.layers}.0."
    kinds = {type(one).__name__ for place, one in modules.items() if place.startswith(layer)}
    if any("LayerNorm" in kind for kind in kinds):
        return residual.LAYER_NORM
    if name in attention.WHOLE:
        return "its heads share as many values between them as the stream has dimensions"
    return "it is not known how its layers read the stream"


def _are_all(names: list[str], modules: Modules) -> bool:
    """Whether nothing but these is there: a norm between the maps would mix the units."""
    owner = names[0].rpartition(".")[0]
    if owner not in modules:
        return False
    owners = {f"{owner}.{name.rpartition('.')[0]}" for name, _ in modules[owner].named_parameters()}
    return owners == set(names)
