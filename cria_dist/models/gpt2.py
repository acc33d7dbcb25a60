"""GPT-2: maps whose weights are stored with inputs as rows, queries, keys and values side by side in one of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cria_dist.models import attention
from cria_dist.models.decoders import PlainMlpFamily
from cria_dist.models.mlp import PART, ModelDict
from cria_dist.models.stacks import Stack
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class Gpt2Family(PlainMlpFamily):
    """GPT-2 and DistilGPT-2."""

    transposed = True
    layers = "transformer.h"
    embedding = "transformer.wte"
    attention_maps = ("attn.c_attn", "attn.c_proj")
    mlp_maps = ("mlp.c_fc", "mlp.c_proj")
    width_key = "n_inner"
    joins: ClassVar[Mapping[str, str]] = {attention.PART: "ln_2", PART: ""}

    def width(self, config: ModelDict) -> int:
        """Four times the hidden size where the config does not say."""
        return int(config.get(self.width_key) or 4 * config["hidden_size"])

    def stack(self, site: Site, config: ModelDict) -> Stack:
        """Of attention all queries, then the keys, then the values."""
        if site.part == attention.PART:
            return Stack((1, 1, 1))
        return PlainMlpFamily.stack(self, site, config)  # slots: super() knows another class
