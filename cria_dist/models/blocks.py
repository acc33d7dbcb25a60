"""A contiguous block of decoder layers, run by the model's own forward pass.

The layers outside the block are stand-ins that hand the hidden state through, so masks, position embeddings and every
per-layer argument come from the model's own code (sliding windows, hybrid layer types), and only the block's weights
are in memory. A whole model is one block; its hidden states are bit-equal to those of its parts run in turn.
"""

import ctypes
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, PreTrainedModel

from cria_dist.errors import DataError
from cria_dist.models import checkpoint
from cria_dist.models.device import own_device
from cria_dist.models.experts import assembled
from cria_dist.models.family import family_of
from cria_dist.models.mlp import MlpFamily
from cria_dist.models.widths import resize_layers


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """Decoder layers ``first`` to ``stop - 1`` of ``total``."""

    first: int
    stop: int
    total: int

    @property
    def is_first(self) -> bool:
        """Whether the block starts from token ids or pixels."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether no block follows."""
        return self.stop == self.total

    def __str__(self) -> str:
        """As in messages and logs."""
        return f"layers {self.first}-{self.stop - 1}"


def partition(total: int, count: int) -> tuple[Block, ...]:
    """``count`` blocks of nearly equal length; the first ones are longer by at most one layer."""
    bounds = [total * index // count for index in range(count + 1)]
    return tuple(Block(first, stop, total) for first, stop in itertools.pairwise(bounds))


class BlockModel:
    """The decoder (or image encoder) of a checkpoint with the weights of one block.

    Args:
        directory: the checkpoint.
        numerics: how it computes.
        family: its adapter.
        block: the layers to load.
    """

    def __init__(self, directory: Path, numerics: checkpoint.Numerics, family: MlpFamily, block: Block) -> None:
        torch.set_float32_matmul_precision(numerics.matmul)
        _give_back_freed_memory()
        self.block = block
        self._family = family
        self.device = own_device()
        self._whole = skeleton(directory, numerics)
        self._decoder = cast("PreTrainedModel", getattr(self._whole, self._whole.base_model_prefix))
        layers = cast(torch.nn.ModuleList, self._whole.get_submodule(family.layers))
        self._set_apart(layers)
        self._passage = Passage()
        if not block.is_first:
            layers[block.first].register_forward_pre_hook(self._passage.enter, with_kwargs=True)
        layers[block.stop - 1].register_forward_hook(self._passage.leave)
        self._load(directory, getattr(torch, numerics.dtype))

    def module(self, name: str) -> torch.nn.Module:
        """A submodule of a layer in the block, by its name in the whole model."""
        return self._whole.get_submodule(name)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Run the block.

        Args:
            values: token ids [S, T] or pixels [S, C, H, W] for the first block, the hidden states [S, T, D] before
                the block for the others.

        Returns:
            Hidden states after the block's last layer (before the final norm), [S, T, D].
        """
        values = values.to(self.device)
        with torch.inference_mode():
            self._passage.hidden = values
            if self._family.takes == "images":
                self._decoder(pixel_values=values)
            elif self.block.is_first:
                self._decoder(input_ids=values.to(torch.int64), use_cache=False)
            else:
                self._decoder(inputs_embeds=embedded(values, self._whole), use_cache=False)
        result, self._passage.hidden = self._passage.hidden, None
        return result

    def _set_apart(self, layers: torch.nn.ModuleList) -> None:
        """Put stand-ins where other blocks' layers and the embedding were."""
        for index, layer in enumerate(layers):
            if not self.block.first <= index < self.block.stop:
                layers[index] = StandIn(layer)
        if not self.block.is_first:
            embedding = self._family.embedding
            self._whole.set_submodule(embedding, StandIn(self._whole.get_submodule(embedding)))

    def _load(self, directory: Path, dtype: torch.dtype) -> None:
        """Fill in the block's parameters, layer by layer: what is read stays mapped until its file is closed.

        Args:
            directory: the checkpoint.
            dtype: data type to compute in.
        """
        depth = len(self._family.layers.split(".")) + 1  # name parts that tell the layers apart
        decoder = f"{self._whole.base_model_prefix}."  # the head is not needed to observe neurons
        parameters = {name: value for name, value in self._whole.named_parameters() if name.startswith(decoder)}
        for _, names in itertools.groupby(parameters, key=lambda name: name.split(".")[:depth]):
            with checkpoint.open_tensors(directory) as tensors:
                for name in names:
                    # a copy: what safetensors hands out keeps the whole file mapped
                    pieces = self._family.pieces(name, parameters[name].shape)
                    values = assembled(pieces, tensors.read) if pieces else tensors.read(self._family.on_disk(name))
                    values = values.to(self.device, dtype, copy=True)
                    if values.shape != parameters[name].shape:
                        raise DataError(
                            f"checkpoint {directory}: {name} has shape {tuple(values.shape)}, config.json says "
                            f"{tuple(parameters[name].shape)}; is config.json of another model?"
                        )
                    parent, _, leaf = name.rpartition(".")
                    setattr(self._whole.get_submodule(parent), leaf, torch.nn.Parameter(values, requires_grad=False))
        for name, buffer in list(self._decoder.named_buffers()):
            parent, _, leaf = name.rpartition(".")
            self._decoder.get_submodule(parent).register_buffer(leaf, buffer.to(self.device), persistent=False)


class Passage:
    """Where the hidden state enters the block and leaves it.

    The layers hold its hooks, and it holds no layer: without a reference cycle a dropped block is freed at once.
    """

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None

    def enter(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the first layer's input."""
        if args:
            return (self.hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.hidden}

    def leave(self, _module: torch.nn.Module, _args: object, output: Any) -> None:
        """Keep the last layer's output."""
        self.hidden = output[0] if isinstance(output, tuple) else output


def embedded(hidden_STD: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """What a model is given whose hidden state is replaced, as wide as its embedding: OPT-350M has a projection behind.

    Args:
        hidden_STD: the hidden state that takes its place.
        model: the model.
    """
    width = getattr(model.get_input_embeddings(), "embedding_dim", hidden_STD.shape[-1])
    return hidden_STD if width == hidden_STD.shape[-1] else hidden_STD[..., :1].expand(-1, -1, width)


class StandIn(torch.nn.Module):
    """Hands the hidden state through in place of what another block holds; other attributes are the original's."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its weights stay on the meta device

    def __getattr__(self, name: str) -> Any:
        """What the model asks its layers for."""
        return getattr(self.__dict__["_layer"], name)

    def forward(
        self, hidden_states: torch.Tensor | None = None, *args: torch.Tensor, **kwargs: torch.Tensor
    ) -> torch.Tensor:
        """The identity; encoders call their embedding by keywords, or with no token ids before the hidden states."""
        if hidden_states is None:
            return kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
        return hidden_states


def _give_back_freed_memory() -> None:
    """Return to the system what the block before left: glibc keeps pieces below 32 MB for itself.

    Measured with blocks of 4 layers (hidden 256, 2048 neurons): 140 MB of 160 would stay resident.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's alone
    if trim is not None:
        trim(0)


def skeleton(directory: Path, numerics: checkpoint.Numerics) -> PreTrainedModel:
    """The whole architecture with weights on the meta device and real buffers (rotary frequencies are computed)."""
    config = checkpoint.read_config(directory)
    stock, parsed = checkpoint.stock_class(config), AutoConfig.for_model(**config)
    with init_empty_weights(include_buffers=False):
        model = stock.from_config(parsed, dtype=getattr(torch, numerics.dtype), trust_remote_code=False)
        resize_layers(model, family_of(config), config)
    return model.eval()
