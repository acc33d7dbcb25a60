"""Decoders whose layers read one stream and write to it: which tensors carry its dimensions, and what one costs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cria_dist.models import attention, residual
from cria_dist.models.mlp import PART, MlpFamily, ModelDict, SiteModules
from cria_dist.models.residual import Rescaling, Stream
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class StreamFamily(MlpFamily):
    """Transformers that can lose dimensions of the residual stream, where it is known how they read and write it.

    Attributes:
        stream: how; None where a dimension cannot be removed.
    """

    stream: Stream | None = None

    def widths(self, config: ModelDict, parts: Collection[str] = (PART,)) -> dict[Site, int]:
        """Also dimensions of the stream."""
        found = MlpFamily.widths(self, config, parts)  # slots: super() knows another class
        asked = residual.with_written(tuple(parts))
        streams = self.stream.sites(config) if self.stream else {}
        return dict(sorted((found | {site: width for site, width in streams.items() if site.part in asked}).items()))

    def modules(self, site: Site) -> SiteModules:
        """Also what is given the stream: the first map of attention, the MLP; or the norm behind them."""
        if site.part not in residual.PARTS:
            return MlpFamily.modules(self, site)
        norm = self.stream.norm(site) if self.stream else ""
        readers = self.attention_maps[0], self.mlp_maps[0].partition(".")[0]
        written = site.part in residual.WRITTEN
        name = norm if written else readers[residual.part_of(site)]
        return SiteModules({}, f"{self.layers}.{site.layer}.{name}", (), leaves=written)

    def joined(self, site: Site) -> str:
        """Where both parts write to the stream as they are: before the second norm, and behind the layer."""
        if self.stream is None or self.stream.written or self.stream.scaled or site.part in residual.PARTS:
            return MlpFamily.joined(self, site)
        layer = f"{self.layers}.{site.layer}"
        return layer if site.part == PART else f"{layer}.{self.stream.norms[1]}"

    def stream_maps(self, site: Site, config: ModelDict) -> tuple[list[str], list[str]]:
        """Stored names of the maps that read the stream at a site, and of those that write it behind."""
        names = (self.attention_maps, self.mlp_maps)[residual.part_of(site)]
        *readers, writer = (self.on_disk(f"{self.layers}.{site.layer}.{name}") for name in names)
        return readers, [writer]

    def stream_weights(self, site: Site, config: ModelDict, met: bool) -> int:
        """Weights of one dimension in these maps; of a mixture, ``met`` counts those that a token meets."""
        shape = attention.attention_shape(config)
        if residual.part_of(site) == 0:
            return shape.unit_weights // shape.hidden * shape.groups[site.layer]
        return 3 * MlpFamily.widths(self, config)[Site(site.layer)]

    def coupled_tensors(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Also those of the stream; the embedding goes with the first reading, the end with the last."""
        if site.part not in residual.PARTS:
            return MlpFamily.coupled_tensors(self, site, config)
        tensors = dict.fromkeys(self.norms(site, config), 0)
        if site.part in residual.WRITTEN:
            return tensors
        readers, writers = self.stream_maps(site, config)
        tensors |= dict.fromkeys((f"{name}.weight" for name in readers), 1)
        for name in writers:
            tensors |= {f"{name}.{leaf}": 0 for leaf in ("weight", "bias")[: 1 + self._writes_bias(site, config)]}
        if site == Site(0, residual.READ[0]):
            tensors[f"{self.embedding}.weight"] = 1
        return tensors | ({"lm_head.weight": 1} if residual.is_last(site, config) else {})  # stored, if it is not tied

    def norms(self, site: Site, config: ModelDict) -> tuple[str, ...]:
        """Weights of the norms that the stream goes through at a site; the final one with the last reading."""
        name = self.stream.norm(site) if self.stream else ""
        own = (f"{self.layers}.{site.layer}.{name}.weight",) if name else ()
        return (*own, *((self._final_norm,) if residual.is_last(site, config) else ()))

    def solved(self, site: Site, config: ModelDict) -> tuple[str, ...]:
        """Also the readers of the stream, and the norms before them."""
        if site.part not in residual.PARTS:
            return MlpFamily.solved(self, site, config)
        readers = () if site.part in residual.WRITTEN else self.stream_maps(site, config)[0]
        return (*self.norms(site, config), *(f"{name}.weight" for name in readers))

    def unit_cost(self, site: Site, config: ModelDict) -> int:
        """Also of a dimension of the stream."""
        if site.part not in residual.PARTS:
            return MlpFamily.unit_cost(self, site, config)
        cost = len(self.norms(site, config))
        if site.part in residual.WRITTEN:
            return cost
        ends = (site == Site(0, residual.READ[0])) + (residual.is_last(site, config) and not residual.is_tied(config))
        cost += self.stream_weights(site, config, met=False) + self._writes_bias(site, config)
        return cost + int(config["vocab_size"]) * ends

    def unit_macs(self, site: Site, config: ModelDict, length: int) -> int:
        """Also of a dimension of the stream."""
        if site.part not in residual.PARTS:
            return MlpFamily.unit_macs(self, site, config, length)
        if site.part in residual.WRITTEN:
            return 0
        head = int(config["vocab_size"]) * residual.is_last(site, config)
        return self.stream_weights(site, config, met=True) + head

    def narrowed(self, config: ModelDict, kept: Mapping[str, int], output_bias: bool) -> dict[str, Any]:
        """The config of the pruned model."""
        streams = {units for key, units in kept.items() if Site.from_key(key).part in residual.PARTS}
        if streams:
            return residual.narrowed(config, streams.pop())
        return MlpFamily.narrowed(self, config, kept, output_bias)

    def rescaled(self, config: ModelDict, pruned: ModelDict) -> dict[str, Rescaling]:
        """The embedding for another root of the hidden size, and the final norm in front of a head tied to it."""
        sizes = int(config["hidden_size"]), int(pruned["hidden_size"])
        if self.stream is None or not self.stream.rooted or sizes[0] == sizes[1]:
            return {}
        tied = {self._final_norm: Rescaling(*sizes, inverse=True, gain=self.stream.gain)}
        return {f"{self.embedding}.weight": Rescaling(*sizes), **(tied if residual.is_tied(config) else {})}

    @property
    def _final_norm(self) -> str:
        return f"{self.layers.rpartition('.')[0]}.norm.weight"

    def _writes_bias(self, site: Site, config: ModelDict) -> bool:
        """Whether the map that writes to the stream has a bias."""
        if residual.part_of(site) == 1:
            return self.has_bias(config)
        return bool(self.stream and self.stream.output_bias and config.get(self.stream.output_bias, False))
