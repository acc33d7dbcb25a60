"""Dimensions of the residual stream as units: one of them runs through the whole model, so all layers keep the same.

Every layer reads the stream twice, for its attention and for its MLP, and writes to it behind each. The two readings
are sites of their own, and so is what is written where it goes through a norm: they are recorded, scored and repaired
one by one, and what stays is decided for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from cria_dist.errors import ConfigError
from cria_dist.models import attention
from cria_dist.records import Site

UNIT = "residual"
"""What ``prune.units`` calls them."""
READ = ("residual_attention", "residual_mlp")
"""Parts of a layer that read the stream."""
WRITTEN = ("residual_attention_written", "residual_mlp_written")
"""What the same parts write, where it goes through a norm; asked for with them."""
PARTS = (*READ, *WRITTEN)


@dataclass(frozen=True, slots=True)
class Stream:
    """How the layers of a family read the stream and write to it: through RMSNorms, or as it is.

    Attributes:
        norms: names within a layer of the norms in front of attention and MLP; none where both read as it is.
        written: names of those behind them; none where both write as they are.
        gain: what a norm multiplies by beside its weight: Gemma's weights are added to one.
        rooted: the embedding is multiplied by the root of the hidden size, in the data type of its weights.
        output_bias: key of config.json that gives attention's output map a bias.
        scaled: what the layers write is multiplied by a number first.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    written: tuple[str, ...] = ()
    gain: float = 0.0
    rooted: bool = False
    output_bias: str = ""
    scaled: bool = False

    def norm(self, site: Site) -> str:
        """The norm of a site, by its name within the layer; nothing where the stream is read as it is."""
        names = self.written if site.part in WRITTEN else self.norms
        return names[part_of(site)] if names else ""

    def sites(self, config: Mapping[str, Any]) -> dict[Site, int]:
        """Dimensions of the stream at every place where it is read, or written through a norm."""
        layers, parts = range(int(config["num_hidden_layers"])), PARTS if self.written else READ
        return {Site(layer, part): int(config["hidden_size"]) for layer in layers for part in parts}


PLAIN = Stream()
BIASED = Stream(output_bias="attention_bias")
GEMMA = Stream(
    ("input_layernorm", "pre_feedforward_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    gain=1.0,
    rooted=True,
    output_bias="attention_bias",
)
LAYER_NORM = "LayerNorm subtracts the mean over all dimensions, so a masked one is not a removed one"
"""Why other families keep theirs."""


@dataclass(frozen=True, slots=True)
class Rescaling:
    """What a tensor is multiplied by when the stream has fewer dimensions, where the stock class goes by their number.

    Attributes:
        before: dimensions of the model operated on.
        after: dimensions that stay.
        inverse: divide instead.
        gain: added before, and taken away after.
    """

    before: int
    after: int
    inverse: bool = False
    gain: float = 0.0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor for the new number; the roots are rounded to its data type, as in the stock class."""
        roots = torch.tensor([self.before, self.after], dtype=torch.float64).sqrt().to(tensor.dtype).tolist()
        factor = roots[1] / roots[0] if self.inverse else roots[0] / roots[1]
        return ((tensor.double() + self.gain) * factor - self.gain).to(tensor.dtype)


def part_of(site: Site) -> int:
    """0 for a site of attention, 1 for one of the MLP."""
    return PARTS.index(site.part) % len(READ)


def with_written(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Parts, and what is written by those of them that read the stream."""
    return (*parts, *(written for read, written in zip(READ, WRITTEN, strict=True) if read in parts))


def is_last(site: Site, config: Mapping[str, Any]) -> bool:
    """Whether nothing but the final norm and the head reads the stream after it."""
    return site == Site(int(config["num_hidden_layers"]) - 1, READ[1])


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding, which config.json need not say."""
    return bool(AutoConfig.for_model(**config).tie_word_embeddings)


def narrowed(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The config of a model with fewer dimensions; heads keep their width, which is no share of theirs any more.

    Raises:
        ConfigError: the family's config refuses so many.
    """
    shape, heads = attention.attention_shape(config), config["num_attention_heads"]
    narrow = {**config, "hidden_size": width, "head_dim": shape.head_dim}
    found = attention.with_groups(narrow, list(shape.groups))
    if attention.LAYER_KV_HEADS in found:
        reason = (
            "its long rotary factors are as many as the quotient says; prune mlp or attention"
            if width % heads == 0
            else f"they must divide it; set prune.multiple to a multiple of {heads}"
        )
        raise ConfigError(
            f"the config of {config['model_type']!r} refuses {width} dimensions and {heads} heads: {reason}"
        )
    return found
