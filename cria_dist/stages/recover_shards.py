"""Parameters shared out over the training workers (FSDP2): each holds a slice of every one, its gradient and moments.

A layer's parameters are whole only while the layer computes. On disk every tensor is whole: a worker reads its slices
of the file, and the first one writes what all gather, a tensor at a time. So a checkpoint is the same file for any
number of workers and for ``ddp``, any of them goes on from it, and nobody holds more than one tensor beside the slices.
``torch.distributed.checkpoint`` writes in parallel, but keeps its index as a pickle, which has no place on shared
storage; its safetensors variant leaves a file per worker that must be merged before anything else can read it.

*Source:* Zhao et al. 2023, https://arxiv.org/abs/2304.11277; ``torch.distributed.fsdp.fully_shard``.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from cria_dist.errors import DataError
from cria_dist.models import checkpoint, writing
from cria_dist.models.blocks import skeleton
from cria_dist.models.device import own_device
from cria_dist.models.family import family_of
from cria_dist.models.streaming import Piece, WindowReader, file_order, write_pieces
from cria_dist.stages.recover_slices import Part, fill, fill_experts, is_gathered, whole

M_MMAP_THRESHOLD = -3
"""Of ``malloc.h``."""


def load_shared(
    directory: Path,
    numerics: checkpoint.Numerics,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
    mixed: bool = False,
    offloaded: bool = False,
) -> PreTrainedModel:
    """Load a model, every worker its slices; all of them call this. No worker ever holds the whole model.

    Args:
        directory: checkpoint.
        numerics: data type of the slices, and precision of matrix products.
        prepare: told the model while it has no weights: what learns, and what is computed again.
        mixed: gather the layers in bfloat16, which ``torch.autocast`` would make of their matrices anyway; what lies
            around the layers and the stream between them stay as they are, as they do under ``autocast``.
        offloaded: keep the slices in main memory, from where a layer is gathered; without a GPU they are there anyway.

    Raises:
        DataError: the checkpoint lacks a tensor.
    """
    torch.set_float32_matmul_precision(numerics.matmul)
    _return_what_was_gathered()
    model = skeleton(directory, numerics)
    model.tie_weights()
    prepare(model)
    device = own_device()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if mixed else None
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offloaded else OffloadPolicy()
    for layer in model.get_submodule(family_of(model.config.to_dict()).layers).children():
        if mixed:
            _widen_norms(layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy(), offload_policy=place)
    # embedding and head stay whole until the backward pass is through: distillation calls the head by itself
    fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=place)
    buffers = {name: buffer.to(device, copy=True) for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if offloaded else device)
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer)
    _read_slices(model, directory)
    model.decode = MethodType(_decode, model)  # pyright: ignore[reportArgumentType]  (a method, not a module)
    register_fsdp_forward_method(model, "decode")
    return model


def _widen_norms(layer: torch.nn.Module) -> None:
    """Have layer norms compute in float32 whatever they are gathered in: ``autocast`` sees to that on GPUs only."""
    for module in layer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            wide: Any = functools.partial(_layer_norm, module)
            module.forward = wide


def _layer_norm(norm: torch.nn.LayerNorm, values: torch.Tensor) -> torch.Tensor:
    affine: Any = (norm.weight, norm.bias)  # may be None
    weight, bias = (part if part is None else part.float() for part in affine)
    return torch.nn.functional.layer_norm(values.float(), norm.normalized_shape, weight, bias, norm.eps)


def _return_what_was_gathered() -> None:
    """Have glibc map what is larger than 128 KiB, so that it goes back to the system when it is freed.

    glibc raises its limit, at first the same, to 32 MB with every array that is freed; then what is gathered leaves a
    heap full of holes. Measured with 62 M parameters (16 layers, float32, all trained), two workers: peaks of 1.40 and
    1.55 GB over the bare process instead of 0.61, where ``ddp`` takes 1.03.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 128 << 10)


def decode(model: PreTrainedModel, **inputs: Any) -> Any:
    """What the model's decoder gives, without the head; parameters that are shared out are gathered for it."""
    return model.decode(**inputs) if is_shared(model) else _decode(model, **inputs)  # pyright: ignore[reportCallIssue]


def _decode(model: PreTrainedModel, **inputs: Any) -> Any:
    return model.base_model(**inputs)


def is_shared(model: torch.nn.Module) -> bool:
    """Whether the model's parameters are shared out over the workers, which then must call it equally often."""
    return isinstance(model, FSDPModule)


def _read_slices(model: PreTrainedModel, directory: Path) -> None:
    family, parameters = family_of(model.config.to_dict()), dict[str, torch.Tensor]()
    for name, parameter in model.named_parameters():
        if pieces := family.pieces(name, parameter.shape):
            fill_experts(parameter.detach(), pieces, directory)
        else:
            parameters[family.on_disk(name)] = parameter.detach()
    for file, names in checkpoint.weight_files(directory).items():
        reader = WindowReader(directory / file)
        for name in parameters.keys() & names:
            fill(parameters.pop(name), reader.read(name))
        reader.close()
    if parameters:
        raise DataError(f"checkpoint {directory} has no tensor {min(parameters)!r}; is config.json of another model?")


def write_together(path: Path, tensors: Mapping[str, Part], rank: int, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write a safetensors file, tensor by tensor; all workers call this, and the first one writes.

    Args:
        path: the file.
        tensors: by name, shared out or not.
        rank: of this worker.
        dtypes: data types in the file.
    """

    def make(name: str) -> torch.Tensor:
        return whole(tensors[name]).to(dtypes[name])

    if rank == 0:
        likes = {name: torch.empty(tensors[name].shape, dtype=kind, device="meta") for name, kind in dtypes.items()}
        write_pieces(path, {name: Piece(like, functools.partial(make, name)) for name, like in likes.items()})
        return
    for name in file_order(dtypes):  # in which the first worker gathers
        if is_gathered(tensors[name]):
            make(name)


def write_like(source: Path, target: Path, state: Mapping[str, Part], rank: int) -> None:
    """What :func:`cria_dist.models.writing.write_like` does, for tensors that are shared out; all call this."""
    if rank == 0:
        target.mkdir(parents=True, exist_ok=True)
    for file, names in checkpoint.weight_files(source).items():
        with safe_open(source / file, framework="pt") as handle:
            dtypes = {name: handle.get_tensor(name).dtype for name in names}
        write_together(target / file, {name: state[name] for name in names}, rank, dtypes)
    if rank == 0:
        writing.finish(source, target, checkpoint.read_config(source))
