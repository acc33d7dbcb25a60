"""Language models: Llama's gated MLP and its relatives, and decoders with two maps and an activation between them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from cria_dist.errors import ConfigError
from cria_dist.models import attention, residual
from cria_dist.models.mlp import PART, MlpFamily, ModelDict, SiteModules
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class DecoderFamily(MlpFamily):
    """Models of a stream of tokens."""

    takes = "tokens"

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one sequence."""
        return (sequence_length,)

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """One per token."""
        return sequence_length

    def _with_biases(self) -> dict[str, Any]:
        raise ConfigError(
            f"prune.repair=bias needs MLP biases, which {self.model_type!r} does not have; "
            "use prune.repair=least_squares"
        )


@dataclass(frozen=True, slots=True)
class GatedMlpFamily(DecoderFamily):
    """Decoders with ``down(act(gate(x)) * up(x))`` and q, k, v, o projections under Llama's module names.

    Attributes:
        mlp_bias_key: config key that gives the three maps biases, or None where the architecture has none.
        attention_bias: whether the maps of queries, keys and values have biases, or the config key that says so.
    """

    mlp_bias_key: str | None = None
    attention_bias: bool | str = False

    parts = (attention.PART, PART)

    layers = "model.layers"
    embedding = "model.embed_tokens"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        if site.part in residual.PARTS:
            return SiteModules({}, residual.reading(self.layers, site).readers[0], ())
        if site.part == attention.PART:
            prefix = f"{self.layers}.{site.layer}.self_attn"
            inputs = {name: f"{prefix}.{name[0]}_proj" for name in ("query", "key", "value")}
            return SiteModules(inputs, f"{prefix}.o_proj", ("value",))
        prefix = f"{self.layers}.{site.layer}.mlp"
        inputs = {"gate": f"{prefix}.gate_proj", "up": f"{prefix}.up_proj"}
        return SiteModules(inputs, f"{prefix}.down_proj", tuple(inputs))

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """Whether the input maps carry biases; where those of the MLP do, its output map does too."""
        if part == attention.PART:
            key = self.attention_bias
            return bool(config.get(key, False)) if isinstance(key, str) else key
        return self.mlp_bias_key is not None and bool(config.get(self.mlp_bias_key, False))

    def coupled_tensors(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Also those that carry the dimensions of the residual stream."""
        if site.part in residual.PARTS:
            return residual.coupled(self.layers, site, config, self._writes_bias(site, config))
        return DecoderFamily.coupled_tensors(self, site, config)

    def solved(self, site: Site, config: ModelDict) -> tuple[str, ...]:
        """Also the readers of the residual stream, and the norms before them."""
        if site.part in residual.PARTS:
            return residual.solved(self.layers, site, config)
        return DecoderFamily.solved(self, site, config)

    def unit_cost(self, site: Site, config: ModelDict) -> int:
        """Also of a dimension of the residual stream."""
        if site.part in residual.PARTS:
            return residual.unit_cost(site, config, self._writes_bias(site, config))
        return DecoderFamily.unit_cost(self, site, config)

    def unit_macs(self, site: Site, config: ModelDict, length: int) -> int:
        """Also of a dimension of the residual stream."""
        if site.part in residual.PARTS:
            return residual.unit_cost(site, config, False, embedding=False)
        return DecoderFamily.unit_macs(self, site, config, length)

    def _writes_bias(self, site: Site, config: ModelDict) -> bool:
        """Whether the map that writes to the residual stream has a bias: Llama's attention, not Qwen's."""
        if site.part == residual.PARTS[1]:
            return self.has_bias(config)
        return isinstance(self.attention_bias, str) and self.has_bias(config, attention.PART)

    def _with_biases(self) -> dict[str, Any]:
        if self.mlp_bias_key is None:
            return DecoderFamily._with_biases(self)  # slots: super() knows another class
        return {self.mlp_bias_key: True}


@dataclass(frozen=True, slots=True)
class FusedMlpFamily(DecoderFamily):
    """Decoders with ``down(act(gate(x)) * up(x))`` whose gate and up projections are one map (Phi-3, GLM)."""

    layers = "model.layers"
    embedding = "model.embed_tokens"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        prefix = f"{self.layers}.{site.layer}.mlp"
        return SiteModules({"gate_up": f"{prefix}.gate_up_proj"}, f"{prefix}.down_proj", ("gate_up",))

    def stack(self, site: Site) -> int:
        """The gate's rows, then those of up."""
        return 2

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They have none."""
        return False


@dataclass(frozen=True, slots=True)
class PlainMlpFamily(DecoderFamily):
    """Decoders with ``output(act(input(x)))``; both maps have biases."""

    maps: ClassVar[tuple[str, str]]
    """Names of the two maps within a layer."""

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        first, second = (f"{self.layers}.{site.layer}.{name}" for name in self.maps)
        return SiteModules({"input": first}, second, ("input",))

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do."""
        return True

    def _with_biases(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class GptNeoxFamily(PlainMlpFamily):
    """GPT-NeoX and Pythia."""

    layers = "gpt_neox.layers"
    embedding = "gpt_neox.embed_in"
    maps = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@dataclass(frozen=True, slots=True)
class OptFamily(PlainMlpFamily):
    """OPT."""

    layers = "model.decoder.layers"
    embedding = "model.decoder.embed_tokens"
    maps = ("fc1", "fc2")
    width_key = "ffn_dim"

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do, unless the config says otherwise."""
        return bool(config.get("enable_bias", True))

    def _with_biases(self) -> dict[str, Any]:
        return {"enable_bias": True}
