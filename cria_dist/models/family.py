"""What surgery and recording must know of a model family: where units live and which tensors carry them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cria_dist.errors import ConfigError
from cria_dist.models.mlp import MlpFamily, ModelDict, SiteModules
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class GatedMlpFamily(MlpFamily):
    """Decoders with ``down(act(gate(x)) * up(x))`` under Llama's module names.

    Attributes:
        mlp_bias_key: config key that gives the three maps biases, or None where the architecture has none.
    """

    mlp_bias_key: str | None = None

    takes = "tokens"
    layers = "model.layers"
    embedding = "model.embed_tokens"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        prefix = f"{self.layers}.{site.layer}.mlp"
        return SiteModules({"gate": f"{prefix}.gate_proj", "up": f"{prefix}.up_proj"}, f"{prefix}.down_proj")

    def has_bias(self, config: ModelDict) -> bool:
        """Whether the three maps carry biases."""
        return self.mlp_bias_key is not None and bool(config.get(self.mlp_bias_key, False))

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one sequence."""
        return (sequence_length,)

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """One per token."""
        return sequence_length

    def _with_biases(self) -> dict[str, Any]:
        if self.mlp_bias_key is None:
            raise ConfigError(
                f"prune.repair=bias needs MLP biases, which {self.model_type!r} does not have; "
                "use prune.repair=least_squares"
            )
        return {self.mlp_bias_key: True}


@dataclass(frozen=True, slots=True)
class VisionMlpFamily(MlpFamily):
    """Image classifiers with ``fc2(act(fc1(x)))`` under ViT's module names; all maps have biases.

    Checkpoints keep the names ViT had before ``transformers`` 5; ``from_pretrained`` and ``save_pretrained`` translate.
    """

    takes = "images"
    layers = "vit.layers"
    embedding = "vit.embeddings"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        prefix = f"{self.layers}.{site.layer}.mlp"
        return SiteModules({"input": f"{prefix}.fc1"}, f"{prefix}.fc2")

    def on_disk(self, name: str) -> str:
        """What checkpoints call a module or parameter."""
        for in_memory, stored in VIT_NAMES.items():
            name = name.replace(in_memory, stored)
        return name

    def has_bias(self, config: ModelDict) -> bool:
        """They do."""
        return True

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one image."""
        return (int(config["num_channels"]), *_pair(config["image_size"]))

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """The class token and one per patch."""
        sides = zip(_pair(config["image_size"]), _pair(config["patch_size"]), strict=True)
        return 1 + math.prod(image // patch for image, patch in sides)

    def _with_biases(self) -> dict[str, Any]:
        return {}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


VIT_NAMES = {
    ".layers.": ".encoder.layer.",
    ".mlp.fc1": ".intermediate.dense",
    ".mlp.fc2": ".output.dense",
    ".attention.q_proj": ".attention.attention.query",
    ".attention.k_proj": ".attention.attention.key",
    ".attention.v_proj": ".attention.attention.value",
    ".attention.o_proj": ".attention.output.dense",
}
"""Parts of ViT's names in memory, and in checkpoints."""

FAMILIES: dict[str, MlpFamily] = {
    family.model_type: family
    for family in (
        GatedMlpFamily("gemma2"),
        GatedMlpFamily("gemma3_text"),
        GatedMlpFamily("llama", mlp_bias_key="mlp_bias"),
        GatedMlpFamily("mistral"),
        GatedMlpFamily("qwen2"),
        GatedMlpFamily("qwen3"),
        VisionMlpFamily("vit"),
    )
}


def family_of(config: ModelDict) -> MlpFamily:
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
