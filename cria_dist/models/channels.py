"""Channels of convolutions as units: of a CIFAR ResNet's blocks, of a VGG, of bottleneck blocks."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from cria_dist.errors import ConfigError
from cria_dist.models import layouts, resnet_bottleneck, resnet_cifar, vgg_cifar
from cria_dist.models.mlp import LAYER_WIDTHS, PART, MlpFamily, ModelDict, SiteModules
from cria_dist.models.residual import UNIT
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class ConvFamily(MlpFamily):
    """Convolutions as linear maps of patches: a unit is a row of one, and in the next one a column per tap.

    Residual streams keep their channels.
    """

    takes = "images"

    def obstacle(self, part: str) -> str:
        """Shortcuts have no one width."""
        return "its residual streams keep their channels" if part == UNIT else ""

    @abstractmethod
    def sites(self, config: ModelDict) -> tuple[layouts.SiteLayout, ...]:
        """The channels of every layer, those of the config's widths."""

    def widths(self, config: ModelDict, parts: Collection[str] = (PART,)) -> dict[Site, int]:
        """Channels of every layer."""
        return {Site(layer): one.channels for layer, one in enumerate(self.sites(config)) if PART in parts}

    def given(self, config: ModelDict, own: list[int]) -> list[int]:
        """Channels of every layer: its own ones, unless the config says otherwise."""
        same = config.get(self.width_key)
        return [int(width) for width in config.get(LAYER_WIDTHS) or ([same] * len(own) if same else own)]

    def span(self, site: Site, config: ModelDict) -> int:
        """The taps of a patch."""
        return self.sites(config)[site.layer].span

    def taps(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Places of a patch that the maps read."""
        one, modules = self.sites(config)[site.layer], self.stored(site)
        return {f"{modules.inputs['input']}.weight": one.taps, f"{modules.output}.weight": one.span}

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do: batch norm is in them."""
        return True

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one image."""
        side = int(config.get("image_size", layouts.SIDE))
        return (layouts.COLOURS, side, side)

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """Places of the first grid; later ones have fewer."""
        return self.sites(config)[0].side ** 2

    def rows_at(self, site: Site, config: ModelDict, rows: Any) -> Any:
        """Where places of the first grid lie in the grid that a site's channels are read at."""
        sites = self.sites(config)
        first, side = sites[0].side, sites[site.layer].side
        step = first // side
        image, place = rows // first**2, rows % first**2
        return image * side**2 + place // first // step * side + place % first // step

    def unit_cost(self, site: Site, config: ModelDict) -> int:
        """A kernel with its bias, and its columns in the next map."""
        one = self.sites(config)[site.layer]
        return one.taps * one.before + 1 + one.span * one.writes

    def removed_twice(self, config: ModelDict, kept: Mapping[str, Sized]) -> int:
        """Where a map reads the channels of one site and makes those of the next, what both of them take of it."""
        sites = self.sites(config)
        gone = [one.channels - len(kept[Site(layer).key]) for layer, one in enumerate(sites)]
        return sum(one.span * gone[layer] * gone[layer + 1] for layer, one in enumerate(sites) if one.chained)

    def unit_macs(self, site: Site, config: ModelDict, length: int) -> int:
        """Not per position: the grids have different numbers of them.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("prune.budget=macs is for transformers; set prune.budget=parameters or units")

    def narrowed(self, config: ModelDict, kept: Mapping[str, int], output_bias: bool) -> dict[str, Any]:
        """The config of the pruned model, with the width of every layer."""
        widths = [kept[key] for key in sorted(kept)]
        return {**config, self.width_key: max(widths), LAYER_WIDTHS: widths}


@dataclass(frozen=True, slots=True)
class ResnetCifarFamily(ConvFamily):
    """The inner channels of blocks of two convolutions."""

    layers = "resnet.layers"
    embedding = "resnet.stem"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        prefix = f"{self.layers}.{site.layer}"
        return SiteModules({"input": f"{prefix}.conv1"}, f"{prefix}.conv2", ("input",), joined=f"{prefix}.joined")

    def sites(self, config: ModelDict) -> tuple[layouts.SiteLayout, ...]:
        """Between the two maps of every block."""
        blocks = layouts.block_layouts(int(config["num_hidden_layers"]))
        taps, widths = layouts.TAPS, self.given(config, [one.channels for one in blocks])
        return tuple(
            layouts.SiteLayout(one.channels_before, taps, width, taps, one.channels, one.side)
            for one, width in zip(blocks, widths, strict=True)
        )


@dataclass(frozen=True, slots=True)
class VggCifarFamily(ConvFamily):
    """The channels of every convolution; the map that reads them makes those of the next."""

    layers = "vgg.layers"
    embedding = "vgg.stem"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed: before the activation, they are pooled."""
        made = f"{self.layers}.{site.layer - 1}.conv" if site.layer else f"{self.embedding}.conv"
        here = f"{self.layers}.{site.layer}"
        return SiteModules({"input": made}, f"{here}.conv", ("input",), {"input": f"{here}.seen"})

    def sites(self, config: ModelDict) -> tuple[layouts.SiteLayout, ...]:
        """Between every two maps."""
        classes = int(AutoConfig.for_model(**config).num_labels or 0)
        return layouts.chain(self.given(config, config["channels"]), config["pools"], classes)


@dataclass(frozen=True, slots=True)
class ResnetBottleneckFamily(ConvFamily):
    """The channels before and behind the 3 x 3 convolution of every block."""

    layers = "resnet.layers"
    embedding = "resnet.stem"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed: before the activation, at the places that patches are around."""
        inner, outer = (f"{self.layers}.{site.layer // 2 * 2 + half}" for half in (0, 1))
        maps = (f"{outer}.conv3", f"{inner}.conv2") if site.layer % 2 else (f"{inner}.conv2", f"{inner}.conv1")
        seen, joined = {"input": f"{self.layers}.{site.layer}.seen"}, f"{outer}.joined" if site.layer % 2 else ""
        return SiteModules({"input": maps[1]}, maps[0], ("input",), seen, joined=joined)

    def sites(self, config: ModelDict) -> tuple[layouts.SiteLayout, ...]:
        """Between the first and second, and the second and third map of every block."""
        blocks = resnet_bottleneck.blocks_of(config)
        own = [inner for _, inner in blocks for _ in range(2)]
        return layouts.bottlenecks([layout for layout, _ in blocks], self.given(config, own))


CONVOLUTIONAL = (
    ResnetCifarFamily(resnet_cifar.ResnetCifarConfig.model_type),
    VggCifarFamily(vgg_cifar.VggCifarConfig.model_type),
    ResnetBottleneckFamily(resnet_bottleneck.ResnetBottleneckConfig.model_type),
)
