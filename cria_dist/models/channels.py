"""Channels of convolutions as units: the inner channels of a CIFAR ResNet's blocks."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cria_dist.errors import ConfigError
from cria_dist.models import layouts, resnet_cifar
from cria_dist.models.mlp import ANY_MLP, LAYER_WIDTHS, PART, MlpFamily, ModelDict, SiteModules
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class ResnetCifarFamily(MlpFamily):
    """Blocks of two convolutions as linear maps of patches: a unit is a row of the first, nine columns of the second.

    The residual stream keeps its channels.
    """

    takes = "images"
    layers = "resnet.layers"
    embedding = "resnet.stem"

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        prefix = f"{self.layers}.{site.layer}"
        return SiteModules({"input": f"{prefix}.conv1"}, f"{prefix}.conv2", ("input",))

    def widths(self, config: ModelDict, parts: Collection[str] = (PART,)) -> dict[Site, int]:
        """Inner channels of every block: those of its stage, unless the config says otherwise."""
        blocks = layouts.block_layouts(int(config["num_hidden_layers"]))
        own = [config.get(self.width_key) or one.channels for one in blocks]
        return {Site(layer): int(width) for layer, width in enumerate(config.get(LAYER_WIDTHS) or own) if PART in parts}

    def span(self, site: Site, config: ModelDict) -> int:
        """The taps of a patch."""
        return layouts.TAPS

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do: batch norm is in them."""
        return True

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one image."""
        return (3, layouts.SIDE, layouts.SIDE)

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """Places of the first grid; later ones have fewer."""
        return layouts.SIDE**2

    def rows_at(self, site: Site, config: ModelDict, rows: Any) -> Any:
        """Where places of the first grid lie in the grid between a block's two maps."""
        side = layouts.block_layouts(int(config["num_hidden_layers"]))[site.layer].side
        step = layouts.SIDE // side
        image, place = rows // layouts.SIDE**2, rows % layouts.SIDE**2
        return image * side**2 + place // layouts.SIDE // step * side + place % layouts.SIDE // step

    def unit_cost(self, site: Site, config: ModelDict) -> int:
        """A kernel with its bias, and nine columns."""
        layout = layouts.block_layouts(int(config["num_hidden_layers"]))[site.layer]
        return layouts.TAPS * (layout.channels_before + layout.channels) + 1

    def unit_macs(self, site: Site, config: ModelDict, length: int) -> int:
        """Not per position: the grids have different numbers of them.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("prune.budget=macs is for transformers; set prune.budget=parameters or units")

    def narrowed(self, config: ModelDict, kept: Mapping[str, int], output_bias: bool) -> dict[str, Any]:
        """The config of the pruned model, with the width of every block."""
        widths = [kept[key] for key in sorted(kept)]
        return {**config, self.width_key: max(widths), LAYER_WIDTHS: widths}

    def signals(self, site: Site = ANY_MLP) -> int:
        """Before and after the activation, in every tap."""
        return 2

    def _with_biases(self) -> dict[str, Any]:
        return {}


RESNET_CIFAR = ResnetCifarFamily(resnet_cifar.ResnetCifarConfig.model_type)
