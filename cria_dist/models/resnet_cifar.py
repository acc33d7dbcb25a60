"""ResNet-20 to 1202 for CIFAR (He et al. 2015, section 4.2; option-A shortcuts), written as linear maps of patches.

An inner channel of a block is a row of ``conv1`` and nine columns of ``conv2``. https://arxiv.org/abs/1512.03385

Shapes: S images, C channels, T places of a grid, N inner channels, D channels of the next map.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from cria_dist.models import layouts
from cria_dist.models.patches import CIFAR, ConvBackbone, ConvClassifier, Patches, Weights, write_classifier


class ResnetCifarConfig(PretrainedConfig):
    """Depth, and inner widths where they are not the stages' own."""

    model_type = "resnet_cifar"

    def __init__(self, num_hidden_layers: int = 9, intermediate_size: int | None = None, **kwargs: Any) -> None:
        self.num_hidden_layers = num_hidden_layers  # blocks, the same number in each stage
        self.intermediate_size = intermediate_size  # inner channels of every block
        self.hidden_size = layouts.STAGES[-1]
        self.num_attention_heads, self.head_dim = 0, 1  # what estimates ask for
        super().__init__(**kwargs)


class Block(GradientCheckpointingLayer):
    """``relu(shortcut(x) + conv2(relu(conv1(x))))``; the shortcut skips places and adds channels of zeros."""

    def __init__(self, layout: layouts.BlockLayout, inner: int) -> None:
        super().__init__()
        self.layout = layout
        self.read = Patches(layout.side_before, layout.stride)
        self.conv1 = nn.Linear(layouts.TAPS * layout.channels_before, inner)
        self.again = Patches(layout.side, 1)
        self.conv2 = nn.Linear(layouts.TAPS * inner, layout.channels)
        self.joined = nn.ReLU()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From [S, T, C] to [S, T', D]."""
        inner_STN = self.read.mapped(hidden_states, self.conv1).relu()
        return self.joined(self._shortcut(hidden_states) + self.again.mapped(inner_STN, self.conv2))

    def _shortcut(self, grid_STC: torch.Tensor) -> torch.Tensor:
        if self.layout.stride == 1:
            return grid_STC
        missing = self.layout.channels - self.layout.channels_before
        return nn.functional.pad(self.read.centres(grid_STC), (missing // 2, missing - missing // 2))


class Stem(nn.Module):
    """The first convolution, pixels [S, 3, H, W] to [S, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches(layouts.SIDE, 1)
        self.conv = nn.Linear(layouts.TAPS * layouts.COLOURS, layouts.STAGES[0])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The hidden states before the first block."""
        return self.patches.mapped(pixel_values.flatten(2).transpose(1, 2), self.conv).relu()


class ResnetCifarForImageClassification(ConvClassifier):
    """The whole classifier."""

    config_class = ResnetCifarConfig
    base_model_prefix = "resnet"

    def __init__(self, config: ResnetCifarConfig) -> None:
        super().__init__(config)
        blocks = layouts.block_layouts(config.num_hidden_layers)
        self.resnet = ConvBackbone(Stem(), [Block(one, config.intermediate_size or one.channels) for one in blocks])
        self.linear = nn.Linear(layouts.STAGES[-1], int(config.num_labels or 0))
        self.post_init()


def convert(weights: Path, target: Path) -> Path:
    """Write a checkpoint of the common implementation (``conv1, bn1, layerN.M.*, linear``) as one of this class.

    Args:
        weights: its state dict in safetensors.
        target: folder to fill.
    """
    given = Weights(weights)
    blocks = given.blocks()
    state = given.linear("linear", "linear") | given.folded("conv1", "bn1", "resnet.stem.conv")
    for number, block in enumerate(blocks):
        for one in ("1", "2"):
            state |= given.folded(f"{block}.conv{one}", f"{block}.bn{one}", f"resnet.layers.{number}.conv{one}")
    settings = ResnetCifarConfig(len(blocks), num_labels=len(given["linear.weight"]))
    return write_classifier(ResnetCifarForImageClassification(settings), state, target, CIFAR)


AutoConfig.register(ResnetCifarConfig.model_type, ResnetCifarConfig)
AutoModelForImageClassification.register(ResnetCifarConfig, ResnetCifarForImageClassification)
