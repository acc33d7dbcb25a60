"""VGG-11 to 19 with batch norm for CIFAR (Simonyan and Zisserman 2014), written as linear maps of patches.

A net is a chain: the channels of a convolution are its rows, and nine columns of the next convolution. A layer here
begins behind a convolution, with the signals before its activation, and ends behind the next one, so that it holds all
that is seen of one site: ``layers.0.conv`` is the second convolution, ``layers.12.conv`` of VGG-16 the classifier. Max
pooling comes before the activation; the two commute. https://arxiv.org/abs/1409.1556

Shapes: S images, C channels, T places of a grid, D channels of the next map.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import max_pool2d
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from cria_dist.models import layouts
from cria_dist.models.patches import CIFAR, ConvBackbone, ConvClassifier, Patches, Weights, write_classifier

VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLS_16 = (1, 3, 6, 9, 12)
"""Convolutions of VGG-16 that max pooling follows."""


class VggCifarConfig(PretrainedConfig):
    """Channels of the convolutions, and which of them max pooling follows.

    The common implementation pools behind the last one too, down to one place; where none does, the classifier reads
    the mean over the places that are left, as in the paper of ``receding``.
    """

    model_type = "vgg_cifar"

    def __init__(
        self,
        channels: Sequence[int] = VGG16,
        pools: Sequence[int] = POOLS_16,
        intermediate_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.channels, self.pools = list(channels), list(pools)
        self.intermediate_size = intermediate_size  # channels of every convolution
        self.num_hidden_layers = len(self.channels)
        self.hidden_size = max(self.channels[:2])  # of the largest grids, by which estimates go
        self.num_attention_heads, self.head_dim = 0, 1  # what estimates ask for
        super().__init__(**kwargs)


class Stem(nn.Module):
    """The first convolution, pixels [S, 3, H, W] to the signals [S, T, C] before its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patches = Patches(layouts.SIDE, 1)
        self.conv = nn.Linear(layouts.TAPS * layouts.COLOURS, channels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The hidden states before the first layer."""
        return self.patches.mapped(pixel_values.flatten(2).transpose(1, 2), self.conv)


class Layer(GradientCheckpointingLayer):
    """``conv(relu(pool(x)))``, pooled or not; the last one's convolution has one tap."""

    def __init__(self, layout: layouts.SiteLayout, pooled: bool) -> None:
        super().__init__()
        self.pool = Patches(2 * layout.side, 2, 2) if pooled else None
        self.seen = nn.Identity()
        self.read = Patches(layout.side, 1, 3 if layout.span == layouts.TAPS else 1)
        self.conv = nn.Linear(layout.span * layout.channels, layout.writes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From [S, T, C] to [S, T', D]."""
        if self.pool is not None:
            hidden_states = max_pool2d(self.pool.pixels(hidden_states), 2).flatten(2).transpose(1, 2)
        return self.read.mapped(self.seen(hidden_states).relu(), self.conv)


class VggCifarForImageClassification(ConvClassifier):
    """The whole classifier; the mean over places comes after its last map, with which it commutes."""

    config_class = VggCifarConfig
    base_model_prefix = "vgg"

    def __init__(self, config: VggCifarConfig) -> None:
        super().__init__(config)
        width = config.intermediate_size
        channels = [width] * len(config.channels) if width else config.channels
        sites = layouts.chain(channels, config.pools, int(config.num_labels or 0))
        layers = [Layer(one, place in config.pools) for place, one in enumerate(sites)]
        self.vgg = ConvBackbone(Stem(channels[0]), list(layers))
        self.linear = nn.Identity()
        self.post_init()


def convert(weights: Path, target: Path, pooled_last: bool = True) -> Path:
    """Write a checkpoint of the common implementation (``features.N``, ``classifier``) as one of this class.

    Args:
        weights: its state dict in safetensors.
        target: folder to fill.
        pooled_last: whether max pooling follows the last convolution, which no tensor tells.

    Raises:
        ConfigError: tensors are missing.
    """
    given = Weights(weights)
    places = sorted({int(name.split(".")[1]) for name in given.names if name.startswith("features.")})[::2]
    pools = [number for number, place in enumerate(places[:-1]) if places[number + 1] - place > 3]
    state = given.linear("classifier", f"vgg.layers.{len(places) - 1}.conv")
    for number, place in enumerate(places):
        name = f"vgg.layers.{number - 1}.conv" if number else "vgg.stem.conv"
        state |= given.folded(f"features.{place}", f"features.{place + 1}", name)
    channels = [len(given[f"features.{place}.weight"]) for place in places]
    settings = VggCifarConfig(
        channels, [*pools, *([len(places) - 1] if pooled_last else [])], num_labels=len(given["classifier.weight"])
    )
    return write_classifier(VggCifarForImageClassification(settings), state, target, CIFAR)


AutoConfig.register(VggCifarConfig.model_type, VggCifarConfig)
AutoModelForImageClassification.register(VggCifarConfig, VggCifarForImageClassification)
