"""Language models: Llama's gated MLP and its relatives, and decoders with two maps and an activation between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cria_dist.models import attention
from cria_dist.models.mlp import PART, ModelDict
from cria_dist.models.stacks import Stack
from cria_dist.models.streams import StreamFamily
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class DecoderFamily(StreamFamily):
    """Models of a stream of tokens; attention under Llama's names, unless a family says otherwise."""

    parts = (attention.PART, PART)
    takes = "tokens"
    attention_maps = tuple(f"self_attn.{name}_proj" for name in "qkvo")

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one sequence."""
        return (sequence_length,)

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """One per token."""
        return sequence_length


@dataclass(frozen=True, slots=True)
class GatedMlpFamily(DecoderFamily):
    """Decoders with ``down(act(gate(x)) * up(x))`` and q, k, v, o projections under Llama's module names.

    Attributes:
        mlp_bias_key: config key that gives the three maps biases, or None where the architecture has none.
        attention_bias: whether the maps of queries, keys and values have biases, or the config key that says so.
    """

    mlp_bias_key: str | None = None
    attention_bias: bool | str = False

    layers = "model.layers"
    embedding = "model.embed_tokens"
    mlp_maps = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    mlp_signals = ("gate", "up")

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """Whether the input maps carry biases; where those of the MLP do, its output map does too."""
        if part == attention.PART:
            key = self.attention_bias
            return bool(config.get(key, False)) if isinstance(key, str) else key
        return self.mlp_bias_key is not None and bool(config.get(self.mlp_bias_key, False))

    def _with_biases(self) -> dict[str, Any]:
        if self.mlp_bias_key is None:
            return DecoderFamily._with_biases(self)  # slots: super() knows another class
        return {self.mlp_bias_key: True}


@dataclass(frozen=True, slots=True)
class FusedMlpFamily(DecoderFamily):
    """Decoders with ``down(act(gate(x)) * up(x))`` whose gate and up projections are one map (GLM)."""

    layers = "model.layers"
    embedding = "model.embed_tokens"
    mlp_maps = ("mlp.gate_up_proj", "mlp.down_proj")
    mlp_signals = ("gate_up",)

    def stack(self, site: Site, config: ModelDict) -> Stack:
        """Of an MLP the gate's rows, then those of up."""
        return Stack((1, 1)) if site.part == PART else DecoderFamily.stack(self, site, config)

    def signal_names(self, site: Site, name: str) -> tuple[str | None, ...]:
        """Of an MLP two."""
        return ("gate_up.0", "gate_up.1") if site.part == PART else DecoderFamily.signal_names(self, site, name)

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """Queries, keys and values do, unless the config says otherwise."""
        return part == attention.PART and bool(config.get("attention_bias", True))


@dataclass(frozen=True, slots=True)
class Phi3Family(FusedMlpFamily):
    """Phi-3 and Phi-4: queries, keys and values are one map too, and nothing has biases."""

    attention_maps = ("self_attn.qkv_proj", "self_attn.o_proj")

    def stack(self, site: Site, config: ModelDict) -> Stack:
        """Of attention all queries, then the keys, then the values, a head of which several queries read."""
        if site.part == attention.PART:
            return Stack((attention.attention_shape(config).queries, 1, 1))
        return FusedMlpFamily.stack(self, site, config)

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They have none."""
        return False


@dataclass(frozen=True, slots=True)
class PlainMlpFamily(DecoderFamily):
    """Decoders with ``output(act(input(x)))``; all maps have biases, every head has its own keys and values."""

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do."""
        return True


@dataclass(frozen=True, slots=True)
class GptNeoxFamily(PlainMlpFamily):
    """GPT-NeoX and Pythia."""

    layers = "gpt_neox.layers"
    embedding = "gpt_neox.embed_in"
    attention_maps = ("attention.query_key_value", "attention.dense")
    mlp_maps = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    joins: ClassVar[Mapping[str, str]] = {PART: ""}  # where attention is added goes by the config

    def stack(self, site: Site, config: ModelDict) -> Stack:
        """Of attention head by head its query, its key and its value."""
        if site.part == attention.PART:
            return Stack((1, 1, 1), by_unit=True)
        return PlainMlpFamily.stack(self, site, config)

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do, but for those of attention where the config says so."""
        return part == PART or bool(config.get("attention_bias", True))


@dataclass(frozen=True, slots=True)
class OptFamily(PlainMlpFamily):
    """OPT."""

    layers = "model.decoder.layers"
    embedding = "model.decoder.embed_tokens"
    attention_maps = (*DecoderFamily.attention_maps[:3], "self_attn.out_proj")
    mlp_maps = ("fc1", "fc2")
    width_key = "ffn_dim"

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do, unless the config says otherwise."""
        return bool(config.get("enable_bias", True))
