"""Attention heads as units: a KV group is a head of keys and values with all the query heads that read it.

With one query head per group (MHA) a unit is a head; with one group (MQA) there is nothing to choose.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cria_dist.records import Site

PART = "attention"
"""Part of a site whose units are KV groups."""
ALL_THREE = "query_key_value"
"""The signal of a map that makes queries, keys and values."""
SIGNALS = {1: (ALL_THREE,), 3: ("query", "key", "value")}
"""By the maps before attention, what they give."""
LAYER_KV_HEADS = "num_key_value_heads_per_layer"
"""Key of config.json where layers have different KV groups; the other counts of heads then are the dense model's."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The attention of a config.json in numbers.

    Attributes:
        groups: KV groups of every layer.
        queries: query heads per group.
        head_dim: width of a head.
        hidden: width of the hidden state.
    """

    groups: tuple[int, ...]
    queries: int
    head_dim: int
    hidden: int

    @property
    def span(self) -> int:
        """Inputs of the output map that one group computes."""
        return self.queries * self.head_dim

    @property
    def unit_weights(self) -> int:
        """Weights that leave with one group: rows of queries, keys and values, columns of the output map."""
        return 2 * (self.queries + 1) * self.head_dim * self.hidden

    @property
    def unit_biases(self) -> int:
        """Biases of one group's queries, keys and values, where there are any."""
        return (self.queries + 2) * self.head_dim

    def unit_macs(self, length: int) -> int:
        """Multiplications per position that leave with one group: its maps, scores and mixtures over ``length``."""
        return self.unit_weights + 2 * length * self.span


def attention_shape(config: Mapping[str, Any]) -> AttentionShape:
    """Read the attention's numbers from a config.json."""
    heads, hidden, dense = int(config["num_attention_heads"]), int(config["hidden_size"]), dense_groups(config)
    per_layer = config.get(LAYER_KV_HEADS) or dense
    return AttentionShape(tuple(per_layer), heads // dense[0], int(config.get("head_dim") or hidden // heads), hidden)


def dense_groups(config: Mapping[str, Any]) -> list[int]:
    """KV groups of every layer of the dense model."""
    groups = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return [groups] * int(config["num_hidden_layers"])


def attention_sites(config: Mapping[str, Any]) -> dict[Site, int]:
    """KV groups of every layer."""
    return {Site(layer, PART): groups for layer, groups in enumerate(attention_shape(config).groups)}


def with_groups(config: Mapping[str, Any], groups: list[int]) -> dict[str, Any]:
    """The config of a model with these KV groups per layer, in the form the stock class takes where there is one.

    Llama's and Gemma's config refuse counts of heads that do not divide the hidden size. Llama's attention without
    biases is Mistral's, whose config takes them; what cannot be said that way is written per layer. Families that have
    no word for the width of a head (BERT, GPT-2, GPT-NeoX, OPT) have heads that left always written per layer.
    """
    shape = attention_shape(config)
    plain = {key: value for key, value in config.items() if key != LAYER_KV_HEADS}
    if config["model_type"] in WHOLE:
        return plain if groups == dense_groups(config) else {**plain, LAYER_KV_HEADS: groups}
    plain["head_dim"] = shape.head_dim
    if len(set(groups)) > 1:
        return {**plain, LAYER_KV_HEADS: groups}
    heads = groups[0] * shape.queries
    uniform = {**plain, "num_attention_heads": heads}
    if config["model_type"] == "vit":  # which knows no groups
        return uniform
    uniform["num_key_value_heads"] = groups[0]
    if not _is_refused(config, shape.hidden % heads):
        return uniform
    if config["model_type"] == "llama" and not config.get("attention_bias") and not config.get("mlp_bias"):
        other = {key: value for key, value in uniform.items() if key not in ("attention_bias", "mlp_bias")}
        named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        return {**other, **named}
    return {**plain, LAYER_KV_HEADS: groups}


@contextmanager
def counting(norm: torch.nn.Module, kept: Sequence[int], units: int) -> Generator[None]:
    """An RMSNorm over all units counts those kept, and gives zeros for the others, until the block ends.

    The root mean square is over the inputs of those kept alone, as when the others are gone: with S of N inputs left
    and the others zero it is ``sqrt(S / N)`` times that, which is made up for before, for the sake of epsilon.

    Args:
        norm: the module.
        kept: units that stay.
        units: how many there are, each with as many consecutive inputs.
    """
    factor = (units / len(kept)) ** 0.5
    weight: Any = norm.weight
    mask_N = torch.isin(torch.arange(units), torch.tensor(kept)).repeat_interleave(len(weight) // units)
    mask_N = mask_N.to(weight.device, torch.float32) * factor  # in bfloat16 the factor would be 0.2 % off
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: (args[0] * mask_N,)),
        norm.register_forward_hook(lambda *args: (args[2] / factor).to(weight.dtype)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_refused(config: Mapping[str, Any], left_over: int) -> bool:
    """Whether the family's config refuses fewer heads, as many as leave so much of the hidden size over."""
    if config["model_type"] == "phi3":  # long rotary factors must be as many as hidden size / heads says
        return any("short_factor" in (config.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    return left_over > 0 and config["model_type"] in REFUSING


REFUSING = ("gemma2", "gemma3_text", "llama")
"""Families whose config is refused when the heads do not divide the hidden size (transformers 5.17 to 5.23)."""
WHOLE = ("bert", "distilbert", "gpt2", "gpt_neox", "helium", "opt", "roberta", "stablelm")
"""Families whose heads share the hidden size between them, however many there are."""
