"""What surgery and recording must know of a model family: where units live and which tensors carry them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cria_dist.errors import ConfigError
from cria_dist.models import attention
from cria_dist.models.channels import CONVOLUTIONAL
from cria_dist.models.decoders import FusedMlpFamily, GatedMlpFamily, GptNeoxFamily, OptFamily, Phi3Family
from cria_dist.models.encoders import BertFamily, DistilBertFamily, RobertaFamily
from cria_dist.models.experts import ExpertsFamily
from cria_dist.models.generic import STREAMS, generic_family, unlike_layers
from cria_dist.models.gpt2 import Gpt2Family
from cria_dist.models.mlp import PART, MlpFamily, ModelDict
from cria_dist.models.residual import BIASED, GEMMA, PLAIN, Stream
from cria_dist.models.streams import StreamFamily


@dataclass(frozen=True, slots=True)
class VisionMlpFamily(MlpFamily):
    """Image classifiers under ViT's module names; all maps have biases, of attention unless the config says otherwise.

    Checkpoints keep the names ViT had before ``transformers`` 5; ``from_pretrained`` and ``save_pretrained`` translate.
    """

    takes = "images"
    parts = (attention.PART, PART)
    layers = "vit.layers"
    embedding = "vit.embeddings"
    attention_maps = tuple(f"attention.{name}_proj" for name in "qkvo")
    mlp_maps = ("mlp.fc1", "mlp.fc2")
    joins: ClassVar[Mapping[str, str]] = {attention.PART: "layernorm_after", PART: ""}

    def on_disk(self, name: str) -> str:
        """What checkpoints call a module or parameter."""
        for in_memory, stored in VIT_NAMES.items():
            name = name.replace(in_memory, stored)
        return name

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do, but for queries, keys and values where the config says so."""
        return part != attention.PART or bool(config.get("qkv_bias", True))

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one image."""
        return (int(config["num_channels"]), *_pair(config["image_size"]))

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """The class token and one per patch."""
        sides = zip(_pair(config["image_size"]), _pair(config["patch_size"]), strict=True)
        return 1 + math.prod(image // patch for image, patch in sides)


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
        GatedMlpFamily("gemma2", GEMMA, attention_bias="attention_bias"),
        GatedMlpFamily("gemma3_text", GEMMA, attention_bias="attention_bias"),
        FusedMlpFamily("glm", PLAIN),
        FusedMlpFamily("glm4", Stream(written=("post_self_attn_layernorm", "post_mlp_layernorm"))),
        Gpt2Family("gpt2"),
        GptNeoxFamily("gpt_neox"),
        GatedMlpFamily("llama", BIASED, mlp_bias_key="mlp_bias", attention_bias="attention_bias"),
        GatedMlpFamily("mistral", PLAIN),
        ExpertsFamily(
            "mixtral", PLAIN, block="block_sparse_moe", maps=("w1", "w3", "w2"), expert_width="intermediate_size"
        ),
        OptFamily("opt"),
        Phi3Family("phi3", PLAIN),
        GatedMlpFamily("qwen2", PLAIN, attention_bias=True),
        GatedMlpFamily("qwen3", BIASED, attention_bias="attention_bias"),
        ExpertsFamily("qwen3_moe", BIASED, attention_bias="attention_bias"),
        BertFamily("bert"),
        DistilBertFamily("distilbert"),
        RobertaFamily("roberta"),
        VisionMlpFamily("vit"),
        *CONVOLUTIONAL,
    )
}

RESIDUAL = tuple(
    sorted({*STREAMS, *(name for name, one in FAMILIES.items() if isinstance(one, StreamFamily) and one.stream)})
)
"""Families that can lose dimensions of the residual stream."""

CONVERTERS = {
    "resnet": "resnet_bottleneck.convert makes a known model of torchvision's weights of ResNet-50, 101 or 152, and "
    "resnet_cifar.convert of those for CIFAR",
    "vgg": "vgg_cifar.convert makes a known model of weights for CIFAR (VGG-11 to 19 with batch norm)",
}
"""Below ``cria_dist.models``, what makes a checkpoint of a known family; by the types of models that are not known."""


def family_of(config: ModelDict) -> MlpFamily:
    """The adapter for a checkpoint: the family's own, or one for all that look like Llama's MLP.

    Raises:
        ConfigError: the family is not known.
    """
    model_type = config.get("model_type")
    if config.get("quantization_config"):
        raise ConfigError("the checkpoint is quantised; give the checkpoint in float32, bfloat16 or float16")
    found = FAMILIES.get(str(model_type)) or generic_family(config)
    if found is None:
        raise ConfigError(
            f"model family {model_type!r} is not known; known families: {', '.join(sorted(FAMILIES))}, and decoders "
            f"whose layers all have mlp.gate_proj, mlp.up_proj and mlp.down_proj{_hint(config)}"
        )
    return found


def _hint(config: ModelDict) -> str:
    """What may be done about a model that is near to a known one."""
    converter, text = CONVERTERS.get(str(config.get("model_type"))), config.get("text_config") or {}
    if converter is not None:
        return f"; cria_dist.models.{converter}"
    if FAMILIES.get(str(text.get("model_type"))) or generic_family(text):
        return f"; its text part is, as {text['model_type']!r}: save that as a checkpoint of its own"
    what = unlike_layers(config)
    return what and f", each reading the one before and all of the same shape: this one's are not ({what})"
