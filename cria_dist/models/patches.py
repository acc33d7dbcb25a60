"""Convolutional classifiers written as linear maps of patches: what all of them are made of.

A k x k convolution reads, at every place, a patch of k * k taps per channel: it is a linear map of ``k * k * C``
numbers, and is stored as one, ``weight.reshape(D, C, k, k)`` being the usual kernel. Batch norm is folded into the
maps, whose biases it becomes: its statistics are those of training. So a channel between two convolutions is a neuron
like any other: a row of one map, and k * k columns of the next.

Shapes: S images, C channels, H and W places of a grid, T = H * W, D channels of the next map.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, unfold
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from cria_dist.errors import ConfigError
from cria_dist.files import write_json

NORMALISED: Mapping[str, Any] = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""How the common implementations normalise images."""
CIFAR: Mapping[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    **NORMALISED,
    "size": {"height": 32, "width": 32},
}
"""CIFAR's images come in the size the nets take."""
NORM_EPSILON = 1e-5


class Patches(nn.Module):
    """The patches around every second place or every place, and linear maps of them."""

    def __init__(self, side: int, stride: int, width: int = 3) -> None:
        super().__init__()
        self.side, self.stride, self.width = side, stride, width

    def forward(self, grid_STC: torch.Tensor) -> torch.Tensor:
        """From [S, T, C] to [S, T', k * k * C]: channel after channel, all taps of each, zeros around the grid."""
        patches = unfold(self.pixels(grid_STC), self.width, padding=self.width // 2, stride=self.stride)
        return patches.transpose(1, 2)

    def mapped(self, grid_STC: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """A linear map of the patches, from [S, T, C] to [S, T', D].

        Patches are made only for hooks that look at them; otherwise the map is carried out as the convolution it is
        (4 to 10 times as fast forward and back on a CPU, 64 images of the grids of a ResNet-20), and for what stands
        in a map's place, such as an adapter.
        """
        hooked = linear._forward_hooks or linear._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]  (no public)
        if hooked or type(linear) is not nn.Linear:
            return linear(self(grid_STC))
        kernel = linear.weight.unflatten(1, (-1, self.width, self.width))
        found = conv2d(self.pixels(grid_STC), kernel, linear.bias, self.stride, padding=self.width // 2)
        return found.flatten(2).transpose(1, 2)

    def centres(self, grid_STC: torch.Tensor) -> torch.Tensor:
        """What lies in the middle of every patch, from [S, T, C] to [S, T', C]."""
        return grid_STC.unflatten(1, (self.side, self.side))[:, :: self.stride, :: self.stride].flatten(1, 2)

    def pixels(self, grid_STC: torch.Tensor) -> torch.Tensor:
        """The grid as an image, [S, C, H, W]."""
        return grid_STC.transpose(1, 2).unflatten(2, (self.side, self.side))


class ConvClassifier(PreTrainedModel):
    """A stem, layers, the mean over all places and a linear map; ``transformers`` loads and saves it like its own."""

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    linear: nn.Module
    """The map of the mean; the identity where the last layer has classes."""

    def get_input_embeddings(self) -> nn.Module:
        """The stem."""
        return cast(nn.Module, self.base_model.stem)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the mean cross entropy where labels are given."""
        logits_SC = self.linear(self.base_model(pixel_values).mean(dim=1))
        loss = None if labels is None else cross_entropy(logits_SC, labels)
        return ImageClassifierOutput(loss=loss, logits=logits_SC)  # pyright: ignore[reportArgumentType]  (its types are the deprecated tensor classes)


class ConvBackbone(nn.Module):
    """Stem and layers."""

    def __init__(self, stem: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.layers = stem, nn.ModuleList(layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The hidden states [S, T, D] after the last layer, from pixels [S, 3, H, W]."""
        hidden_STD = self.stem(pixel_values)
        for layer in self.layers:
            hidden_STD = layer(hidden_STD)
        return hidden_STD


class Weights:
    """A state dict of a common implementation, whose convolutions have batch norms behind them.

    Args:
        path: the state dict in safetensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._given = {name.removeprefix("module."): tensor for name, tensor in load_file(path).items()}

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._given)

    def blocks(self) -> list[str]:
        """Names of the residual blocks, in order."""
        found = {tuple(map(int, name[5:].split(".")[:2])) for name in self._given if name.startswith("layer")}
        return [f"layer{stage}.{place}" for stage, place in sorted(found)]

    def __getitem__(self, name: str) -> torch.Tensor:
        """One of its tensors.

        Raises:
            ConfigError: it has no such tensor.
        """
        if name not in self._given:
            raise ConfigError(
                f"{self._path} has no tensor {name!r}, as the common implementation's state dict has; give that one"
            )
        return self._given[name]

    def folded(self, conv: str, norm: str, name: str) -> dict[str, torch.Tensor]:
        """The linear map that a convolution and the batch norm behind it are, with running statistics.

        Args:
            conv: name of the convolution.
            norm: name of the batch norm.
            name: of the map.
        """
        scale_D = self[f"{norm}.weight"] / (self[f"{norm}.running_var"] + NORM_EPSILON).sqrt()
        bias_D = self[f"{norm}.bias"] - scale_D * self[f"{norm}.running_mean"]
        if f"{conv}.bias" in self._given:
            bias_D = bias_D + scale_D * self[f"{conv}.bias"]
        return {f"{name}.weight": self[f"{conv}.weight"].flatten(1) * scale_D[:, None], f"{name}.bias": bias_D}

    def linear(self, given: str, name: str) -> dict[str, torch.Tensor]:
        """A linear map as it is, under another name."""
        return {f"{name}.{part}": self[f"{given}.{part}"] for part in ("weight", "bias")}


def write_classifier(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], target: Path, processor: Mapping[str, Any]
) -> Path:
    """Fill a model and write it as a checkpoint, with its image processor; returns the folder."""
    model.load_state_dict(dict(state))
    model.save_pretrained(target)
    write_json(target / "preprocessor_config.json", processor)
    return target
