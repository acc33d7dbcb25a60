"""GPT-2: maps whose weights are stored with inputs as rows, queries, keys and values side by side in one of them."""

from dataclasses import dataclass

from cria_dist.models import attention
from cria_dist.models.decoders import PlainMlpFamily
from cria_dist.models.mlp import PART, ModelDict, SiteModules
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class Gpt2Family(PlainMlpFamily):
    """GPT-2 and DistilGPT-2; all maps have biases, every head has its own keys and values."""

    parts = (attention.PART, PART)
    transposed = True
    layers = "transformer.h"
    embedding = "transformer.wte"
    maps = ("mlp.c_fc", "mlp.c_proj")
    width_key = "n_inner"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        if site.part == attention.PART:
            prefix = f"{self.layers}.{site.layer}.attn"
            return SiteModules({"query_key_value": f"{prefix}.c_attn"}, f"{prefix}.c_proj", ("query_key_value",))
        return PlainMlpFamily.modules(self, site)  # slots: super() knows another class

    def width(self, config: ModelDict) -> int:
        """Four times the hidden size where the config does not say."""
        return int(config.get(self.width_key) or 4 * config["hidden_size"])

    def stack(self, site: Site) -> int:
        """Of attention: queries, keys, values."""
        return 3 if site.part == attention.PART else 1

    def signal_names(self, site: Site, name: str) -> tuple[str | None, ...]:
        """Of attention the values alone, as in other families."""
        return (None, None, "value") if site.part == attention.PART else (name,)
