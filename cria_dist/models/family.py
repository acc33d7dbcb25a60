"""What surgery and recording must know of a model family: where units live and which tensors carry them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cria_dist.errors import ConfigError
from cria_dist.records import Site

ModelDict = Mapping[str, Any]
"""The content of a checkpoint's config.json."""


@dataclass(frozen=True, slots=True)
class SiteModules:
    """Module names of one site.

    Attributes:
        inputs: linear maps whose outputs are the pre-activation signals, by signal name.
        output: linear map whose input is the post-activation signal.
    """

    inputs: Mapping[str, str]
    output: str


@dataclass(frozen=True, slots=True)
class GatedMlpFamily:
    """Decoders with ``down(act(gate(x)) * up(x))`` under Llama's module names.

    Attributes:
        model_type: ``model_type`` of config.json.
        mlp_bias_key: config key that gives the three maps biases, or None where the architecture has none.
    """

    model_type: str
    mlp_bias_key: str | None = None

    @property
    def layers(self) -> str:
        """Module name of the list of decoder layers."""
        return "model.layers"

    def widths(self, config: ModelDict) -> dict[Site, int]:
        """Units per site: the MLP neurons of every layer."""
        return {Site(layer): int(config["intermediate_size"]) for layer in range(int(config["num_hidden_layers"]))}

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        prefix = f"{self.layers}.{site.layer}.mlp"
        return SiteModules({"gate": f"{prefix}.gate_proj", "up": f"{prefix}.up_proj"}, f"{prefix}.down_proj")

    def has_bias(self, config: ModelDict) -> bool:
        """Whether the three maps carry biases."""
        return self.mlp_bias_key is not None and bool(config.get(self.mlp_bias_key, False))

    def coupled_tensors(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Tensors that carry the site's units, with the dimension the units lie along."""
        modules = self.modules(site)
        tensors = {f"{module}.weight": 0 for module in modules.inputs.values()}
        if self.has_bias(config):
            tensors |= {f"{module}.bias": 0 for module in modules.inputs.values()}
        return {**tensors, f"{modules.output}.weight": 1}

    def unit_cost(self, config: ModelDict) -> int:
        """Parameters that leave the model with one unit: two rows, one column, two biases if there are any."""
        return 3 * int(config["hidden_size"]) + (2 if self.has_bias(config) else 0)

    def output_bias_cost(self, config: ModelDict, kept: int) -> int:
        """Parameters a site gains when the repair gives its output map a bias: the input maps get one of zeros too."""
        return 0 if self.has_bias(config) else int(config["hidden_size"]) + 2 * kept

    def narrowed(self, config: ModelDict, kept: Mapping[str, int], output_bias: bool) -> dict[str, Any]:
        """The config of the pruned model.

        Args:
            config: config of the dense model.
            kept: surviving units per site key.
            output_bias: the repair adds a bias to every output map.

        Raises:
            ConfigError: sites differ in width, or a bias is needed and the architecture has none.
        """
        widths = set(kept.values())
        if len(widths) != 1:
            raise ConfigError(
                f"widths {min(widths)}..{max(widths)} differ between layers, but the stock {self.model_type!r} class "
                "has one intermediate_size; use a uniform allocation"
            )
        changes: dict[str, Any] = {"intermediate_size": widths.pop()}
        if output_bias:
            if self.mlp_bias_key is None:
                raise ConfigError(
                    f"prune.repair=bias needs MLP biases, which {self.model_type!r} does not have; "
                    "use prune.repair=least_squares"
                )
            changes[self.mlp_bias_key] = True
        return {**config, **changes}


FAMILIES = {
    family.model_type: family
    for family in (
        GatedMlpFamily("gemma2"),
        GatedMlpFamily("gemma3_text"),
        GatedMlpFamily("llama", mlp_bias_key="mlp_bias"),
        GatedMlpFamily("mistral"),
        GatedMlpFamily("qwen2"),
        GatedMlpFamily("qwen3"),
    )
}


def family_of(config: ModelDict) -> GatedMlpFamily:
    """The adapter for a checkpoint.

    Raises:
        ConfigError: the family is not known.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model family {model_type!r} is not known; known families: {', '.join(sorted(FAMILIES))}")
    if config.get("quantization_config"):
        raise ConfigError("the checkpoint is quantised; give the checkpoint in float32, bfloat16 or float16")
    return FAMILIES[model_type]
