"""ResNet-50, 101 and 152 (He et al. 2015; strides in the 3 x 3 convolutions), written as linear maps of patches.

The channels between the three maps of a block are units, in two sites: those that ``conv1`` makes and ``conv2`` reads,
and those that ``conv2`` makes and ``conv3`` reads. So a block is two layers here. The first ends behind ``conv2``: its
hidden states are the signals before the second activation, and beside them the shortcut. The residual stream keeps its
channels. https://arxiv.org/abs/1512.03385

Shapes: S images, C channels, T places of a grid, N channels within a block, D channels of the next map.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import max_pool2d
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from cria_dist.models import layouts
from cria_dist.models.patches import (
    NORMALISED,
    ConvBackbone,
    ConvClassifier,
    Patches,
    Weights,
    write_classifier,
)

STEM = 7
"""Taps of the first convolution along each side."""
STEM_STRIDE = 4
"""Places of an image for one of the first block: the convolution halves them, and so does the pooling."""


class ResnetBottleneckConfig(PretrainedConfig):
    """Depth and widths of the stages; that of ResNet-50 unless it is given."""

    model_type = "resnet_bottleneck"

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        inner_channels: Sequence[int] = (64, 128, 256, 512),
        channels: Sequence[int] = (256, 512, 1024, 2048),
        stem_channels: int = 64,
        image_size: int = 224,
        intermediate_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)  # blocks in each stage
        self.inner_channels = list(inner_channels)  # between the maps of a block
        self.channels, self.stem_channels = list(channels), stem_channels  # of the residual stream
        self.image_size = image_size
        self.intermediate_size = intermediate_size  # inner channels of every block
        self.num_hidden_layers = 2 * sum(self.depths)
        self.hidden_size = self.channels[0] + self.inner_channels[0]  # of the largest grid, by which estimates go
        self.num_attention_heads, self.head_dim = 0, 1  # what estimates ask for
        super().__init__(**kwargs)


class Stem(nn.Module):
    """A 7 x 7 convolution and a pooling, pixels [S, 3, H, W] to [S, T, C]."""

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.patches = Patches(side, 2, STEM)
        self.conv = nn.Linear(STEM**2 * layouts.COLOURS, channels)
        self.pool = Patches(side // 2, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The hidden states before the first layer."""
        grid_STC = self.patches.mapped(pixel_values.flatten(2).transpose(1, 2), self.conv).relu()
        return max_pool2d(self.pool.pixels(grid_STC), 3, 2, padding=1).flatten(2).transpose(1, 2)


class Inner(GradientCheckpointingLayer):
    """The first half of a block, ``conv2(relu(conv1(x)))`` and beside it the shortcut of x."""

    def __init__(self, layout: layouts.BlockLayout, first: int, second: int) -> None:
        super().__init__()
        side, stride = layout.side_before, layout.stride
        self.read = Patches(side, 1, 1)
        self.conv1 = nn.Linear(layout.channels_before, first)
        self.seen = nn.Identity()
        self.again = Patches(side, stride)
        self.conv2 = nn.Linear(layouts.TAPS * first, second)
        self.beside = Patches(side, stride, 1)
        self.shortcut = None if layout.keeps_shape else nn.Linear(layout.channels_before, layout.channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From [S, T, C] to [S, T', N + D]."""
        inner_STN = self.read.mapped(hidden_states, self.conv1)
        self.seen(self.again.centres(inner_STN))  # the output is of the places that the next map has patches around
        aside = hidden_states if self.shortcut is None else self.beside.mapped(hidden_states, self.shortcut)
        return torch.cat((self.again.mapped(inner_STN.relu(), self.conv2), aside), dim=-1)


class Outer(GradientCheckpointingLayer):
    """The second half of a block, ``relu(shortcut + conv3(relu(x)))``."""

    def __init__(self, layout: layouts.BlockLayout, second: int) -> None:
        super().__init__()
        self.seen = nn.Identity()
        self.read = Patches(layout.side, 1, 1)
        self.conv3 = nn.Linear(second, layout.channels)
        self.joined = nn.ReLU()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From [S, T, N + D] to [S, T, D]."""
        inner_STN, aside_STD = hidden_states.tensor_split([self.conv3.in_features], dim=-1)
        return self.joined(aside_STD + self.read.mapped(self.seen(inner_STN).relu(), self.conv3))


class ResnetBottleneckForImageClassification(ConvClassifier):
    """The whole classifier."""

    config_class = ResnetBottleneckConfig
    base_model_prefix = "resnet"

    def __init__(self, config: ResnetBottleneckConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        for block, inner in blocks_of(config.to_dict()):
            width = config.intermediate_size or inner
            layers += [Inner(block, width, width), Outer(block, width)]
        self.resnet = ConvBackbone(Stem(config.image_size, config.stem_channels), layers)
        self.linear = nn.Linear(config.channels[-1], int(config.num_labels or 0))
        self.post_init()


def blocks_of(config: Mapping[str, Any]) -> list[tuple[layouts.BlockLayout, int]]:
    """The blocks, each with the channels between its maps before any were removed."""
    side, before = int(config["image_size"]) // STEM_STRIDE, int(config["stem_channels"])
    stages = zip(config["inner_channels"], config["depths"], strict=True)
    inner = [width for width, depth in stages for _ in range(depth)]
    return list(zip(layouts.stacked(config["depths"], config["channels"], before, side), inner, strict=True))


def convert(weights: Path, target: Path, image_size: int = 224) -> Path:
    """Write a checkpoint of torchvision's naming (``conv1, bn1, layerN.M.*, fc``) as one of this class.

    Args:
        weights: its state dict in safetensors.
        target: folder to fill.
        image_size: pixels along each side of the images; a multiple of 32.

    Raises:
        ConfigError: tensors are missing.
    """
    given = Weights(weights)
    blocks = given.blocks()
    stages = sorted({block.partition(".")[0] for block in blocks})
    state = given.linear("fc", "linear") | given.folded("conv1", "bn1", "resnet.stem.conv")
    for number, block in enumerate(blocks):
        inner, outer = f"resnet.layers.{2 * number}", f"resnet.layers.{2 * number + 1}"
        for one, layer in (("1", inner), ("2", inner), ("3", outer)):
            state |= given.folded(f"{block}.conv{one}", f"{block}.bn{one}", f"{layer}.conv{one}")
        if f"{block}.downsample.0.weight" in given.names:
            state |= given.folded(f"{block}.downsample.0", f"{block}.downsample.1", f"{inner}.shortcut")
    settings = ResnetBottleneckConfig(
        [sum(block.startswith(f"{stage}.") for block in blocks) for stage in stages],
        [len(given[f"{stage}.0.conv1.weight"]) for stage in stages],
        [len(given[f"{stage}.0.conv3.weight"]) for stage in stages],
        len(given["conv1.weight"]),
        image_size,
        num_labels=len(given["fc.weight"]),
    )
    return write_classifier(ResnetBottleneckForImageClassification(settings), state, target, processor(image_size))


def processor(image_size: int) -> dict[str, Any]:
    """How torchvision prepares images: the middle of one whose shorter side is 8/7 of the size."""
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "crop_pct": 0.875,
        "resample": 2,
        **NORMALISED,
    }


AutoConfig.register(ResnetBottleneckConfig.model_type, ResnetBottleneckConfig)
AutoModelForImageClassification.register(ResnetBottleneckConfig, ResnetBottleneckForImageClassification)
