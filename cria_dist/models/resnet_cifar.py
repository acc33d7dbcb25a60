"""ResNet-20 to 1202 for CIFAR (He et al. 2015, section 4.2; option-A shortcuts), written as linear maps of patches.

A 3 x 3 convolution reads, at every place, a patch of 9 taps per channel: it is a linear map of ``9 C`` numbers, and is
stored as one, ``weight.reshape(D, C, 3, 3)`` being the usual kernel. Batch norm is folded into the maps, whose biases
it becomes: its statistics are those of training. So an inner channel of a block is a neuron like any other: a row of
``conv1`` and nine columns of ``conv2``. https://arxiv.org/abs/1512.03385

Shapes: S images, C channels, H and W places of a grid, T = H * W, N inner channels, D channels of the next map.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, unfold
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from cria_dist.files import write_json
from cria_dist.models import layouts

STEM = 27
"""Numbers in a patch of a colour image."""
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"height": 32, "width": 32},
}
"""How the common implementation's images are normalised."""


class ResnetCifarConfig(PretrainedConfig):
    """Depth, and inner widths where they are not the stages' own."""

    model_type = "resnet_cifar"

    def __init__(self, num_hidden_layers: int = 9, intermediate_size: int | None = None, **kwargs: Any) -> None:
        self.num_hidden_layers = num_hidden_layers  # blocks, the same number in each stage
        self.intermediate_size = intermediate_size  # inner channels of every block
        self.hidden_size = layouts.STAGES[-1]
        self.num_attention_heads, self.head_dim = 0, 1  # what estimates ask for
        super().__init__(**{"num_labels": 10, **kwargs})


class Patches(nn.Module):
    """The 3 x 3 patches around every second place or every place, and linear maps of them."""

    def __init__(self, side: int, stride: int) -> None:
        super().__init__()
        self.side, self.stride = side, stride

    def forward(self, grid_STC: torch.Tensor) -> torch.Tensor:
        """From [S, T, C] to [S, T', 9 C]: channel after channel, nine taps each, zeros around the grid."""
        return unfold(self._pixels(grid_STC), 3, padding=1, stride=self.stride).transpose(1, 2)

    def mapped(self, grid_STC: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """A linear map of the patches, from [S, T, C] to [S, T', D].

        Patches are made only for hooks that look at them; otherwise the map is carried out as the convolution it is
        (4 to 10 times as fast forward and back on a CPU, 64 images of the grids of a ResNet-20).
        """
        if linear._forward_hooks or linear._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]  (no public name)
            return linear(self(grid_STC))
        kernel = linear.weight.unflatten(1, (-1, 3, 3))
        return conv2d(self._pixels(grid_STC), kernel, linear.bias, self.stride, padding=1).flatten(2).transpose(1, 2)

    def _pixels(self, grid_STC: torch.Tensor) -> torch.Tensor:
        return grid_STC.transpose(1, 2).unflatten(2, (self.side, self.side))


class Block(nn.Module):
    """``relu(shortcut(x) + conv2(relu(conv1(x))))``; the shortcut skips places and adds channels of zeros."""

    def __init__(self, layout: layouts.BlockLayout, inner: int) -> None:
        super().__init__()
        self.layout = layout
        self.read = Patches(layout.side_before, layout.stride)
        self.conv1 = nn.Linear(layouts.TAPS * layout.channels_before, inner)
        self.again = Patches(layout.side, 1)
        self.conv2 = nn.Linear(layouts.TAPS * inner, layout.channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From [S, T, C] to [S, T', D]."""
        inner_STN = self.read.mapped(hidden_states, self.conv1).relu()
        return (self._shortcut(hidden_states) + self.again.mapped(inner_STN, self.conv2)).relu()

    def _shortcut(self, grid_STC: torch.Tensor) -> torch.Tensor:
        if self.layout.stride == 1:
            return grid_STC
        side, missing = self.layout.side_before, self.layout.channels - self.layout.channels_before
        fewer = grid_STC.unflatten(1, (side, side))[:, ::2, ::2].flatten(1, 2)
        return nn.functional.pad(fewer, (missing // 2, missing - missing // 2))


class Stem(nn.Module):
    """The first convolution, pixels [S, 3, H, W] to [S, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches(layouts.SIDE, 1)
        self.conv = nn.Linear(STEM, layouts.STAGES[0])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The hidden states before the first block."""
        return self.patches.mapped(pixel_values.flatten(2).transpose(1, 2), self.conv).relu()


class Backbone(nn.Module):
    """Stem and blocks."""

    def __init__(self, config: ResnetCifarConfig) -> None:
        super().__init__()
        self.stem = Stem()
        blocks = layouts.block_layouts(config.num_hidden_layers)
        self.layers = nn.ModuleList(Block(one, config.intermediate_size or one.channels) for one in blocks)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The hidden states after the last block."""
        hidden_STD = self.stem(pixel_values)
        for layer in self.layers:
            hidden_STD = layer(hidden_STD)
        return hidden_STD


class ResnetCifarForImageClassification(PreTrainedModel):
    """The whole classifier; ``transformers`` loads and saves it like its own."""

    config_class = ResnetCifarConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: ResnetCifarConfig) -> None:
        super().__init__(config)
        self.resnet = Backbone(config)
        self.linear = nn.Linear(layouts.STAGES[-1], int(config.num_labels or 0))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The stem."""
        return self.resnet.stem

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the mean cross entropy where labels are given."""
        logits_SC = self.linear(self.resnet(pixel_values).mean(dim=1))
        loss = None if labels is None else cross_entropy(logits_SC, labels)
        return ImageClassifierOutput(loss=loss, logits=logits_SC)  # pyright: ignore[reportArgumentType]  (its types are the deprecated tensor classes)


def convert(weights: Path, target: Path) -> Path:
    """Write a checkpoint of the common implementation (``conv1, bn1, layerN.M.*, linear``) as one of this class.

    Args:
        weights: its state dict in safetensors.
        target: folder to fill.
    """
    given = {name.removeprefix("module."): tensor for name, tensor in load_file(weights).items()}
    blocks = sorted({tuple(map(int, name[5:].split(".")[:2])) for name in given if name.startswith("layer")})
    state = {"linear.weight": given["linear.weight"], "linear.bias": given["linear.bias"]}
    state |= _folded(given, "conv1", "bn1", "resnet.stem.conv")
    for number, (stage, place) in enumerate(blocks):
        for one in ("1", "2"):
            block = f"layer{stage}.{place}"
            state |= _folded(given, f"{block}.conv{one}", f"{block}.bn{one}", f"resnet.layers.{number}.conv{one}")
    model = ResnetCifarForImageClassification(ResnetCifarConfig(len(blocks)))
    model.load_state_dict(state)
    model.save_pretrained(target)
    write_json(target / "preprocessor_config.json", PREPROCESSOR)
    return target


def _folded(given: dict[str, torch.Tensor], conv: str, norm: str, name: str) -> dict[str, torch.Tensor]:
    """The linear map that a convolution and the batch norm after it are, with running statistics."""
    scale_D = given[f"{norm}.weight"] / (given[f"{norm}.running_var"] + 1e-5).sqrt()
    bias_D = given[f"{norm}.bias"] - scale_D * given[f"{norm}.running_mean"]
    return {f"{name}.weight": given[f"{conv}.weight"].flatten(1) * scale_D[:, None], f"{name}.bias": bias_D}


AutoConfig.register(ResnetCifarConfig.model_type, ResnetCifarConfig)
AutoModelForImageClassification.register(ResnetCifarConfig, ResnetCifarForImageClassification)
