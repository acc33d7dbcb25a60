"""Attention heads as units: a KV group is a head of keys and values with all the query heads that read it.

With one query head per group (MHA) a unit is a head; with one group (MQA) there is nothing to choose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cria_dist.records import Site

PART = "attention"
"""Part of a site whose units are KV groups."""
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
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    groups = int(config.get("num_key_value_heads") or heads)
    per_layer = config.get(LAYER_KV_HEADS) or [groups] * int(config["num_hidden_layers"])
    return AttentionShape(tuple(per_layer), heads // groups, int(config.get("head_dim") or hidden // heads), hidden)


def attention_sites(config: Mapping[str, Any]) -> dict[Site, int]:
    """KV groups of every layer."""
    return {Site(layer, PART): groups for layer, groups in enumerate(attention_shape(config).groups)}


def with_groups(config: Mapping[str, Any], groups: list[int]) -> dict[str, Any]:
    """The config of a model with these KV groups per layer, in the form the stock class takes where there is one.

    Llama's and Gemma's config refuse counts of heads that do not divide the hidden size. Llama's attention without
    biases is Mistral's, whose config takes them; what cannot be said that way is written per layer. BERT's and GPT-2's
    kin have no word for the width of a head: heads that left are always written per layer.
    """
    shape = attention_shape(config)
    plain = {key: value for key, value in config.items() if key != LAYER_KV_HEADS}
    if config["model_type"] in WHOLE:
        return plain if set(groups) == {int(config["num_attention_heads"])} else {**plain, LAYER_KV_HEADS: groups}
    plain["head_dim"] = shape.head_dim
    if len(set(groups)) > 1:
        return {**plain, LAYER_KV_HEADS: groups}
    heads = groups[0] * shape.queries
    uniform = {**plain, "num_attention_heads": heads}
    if config["model_type"] == "vit":  # which knows no groups
        return uniform
    uniform["num_key_value_heads"] = groups[0]
    if shape.hidden % heads == 0 or config["model_type"] not in REFUSING:
        return uniform
    if config["model_type"] == "llama" and not config.get("attention_bias") and not config.get("mlp_bias"):
        other = {key: value for key, value in uniform.items() if key not in ("attention_bias", "mlp_bias")}
        named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        return {**other, **named}
    return {**plain, LAYER_KV_HEADS: groups}


REFUSING = ("gemma2", "gemma3_text", "llama")
"""Families whose config is refused when the heads do not divide the hidden size (transformers 5.17 to 5.23)."""
WHOLE = ("bert", "distilbert", "gpt2", "roberta")
"""Families whose heads share the hidden size between them, however many there are."""
