"""The dense model that a recovery learns from, and where its weights lie; that changes no number.

Beside the student by default, in slices if the workers share out the student; else in main memory, or on GPUs of its
own. Wherever it lies, it is called with tensors on the student's device and answers there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, infer_auto_device_map
from accelerate.utils import get_balanced_memory, send_to_device
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import skeleton
from cria_dist.models.device import own_device
from cria_dist.stages.recover_shards import load_shared
from cria_dist.stages.recover_step import Place

ROOM = 0.9
"""Of a GPU's free memory that weights may take; the rest is for what is computed of one sequence."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """The dense model.

    Attributes:
        model_dir: its checkpoint.
        dtype: data type it computes in; the student is trained in float32.
        layers: its layers that the student has; None where it has all.
    """

    model_dir: Path
    dtype: str
    layers: tuple[int, ...] | None = None


def load_teacher(teacher: Teacher, config: RecoverConfig, matmul: str, place: Place) -> PreTrainedModel:
    """Load the dense model where the recipe wants it.

    Args:
        teacher: the dense model.
        config: recipe.
        matmul: precision of float32 matrix products.
        place: this worker.

    Raises:
        ConfigError: it is too large for the GPUs of its own.
    """
    numerics = checkpoint.Numerics(teacher.dtype, matmul)
    offloaded = config.teacher == "cpu"
    if place.shares(config):
        return load_shared(teacher.model_dir, numerics, offloaded=offloaded)
    if place.spare:
        free = {number: int(ROOM * torch.cuda.mem_get_info(number)[0]) for number in place.spare}
        return load_spread(teacher.model_dir, numerics, free)
    return (load_offloaded if offloaded else checkpoint.load_model)(teacher.model_dir, numerics)


def load_offloaded(directory: Path, numerics: checkpoint.Numerics) -> PreTrainedModel:
    """Weights in main memory; those of one module at a time are on the GPU, if there is one, while it computes.

    What is around the decoder or encoder stays there: distillation calls the head for every chunk of tokens.
    """
    model = checkpoint.load_model(directory, numerics, {"": "cpu"})
    cpu_offload(model.base_model, own_device())
    for part in model.children():
        if part is not model.base_model:
            part.to(own_device())
    return model


def load_spread(directory: Path, numerics: checkpoint.Numerics, free: Mapping[int, int]) -> PreTrainedModel:
    """Weights spread over GPUs other than the student's.

    Args:
        directory: checkpoint.
        numerics: how it computes.
        free: bytes of weights that each of the GPUs takes, by its number.

    Raises:
        ConfigError: they are too few.
    """
    architecture = skeleton(directory, numerics)
    architecture.tie_weights()  # what is tied goes to one GPU
    model = checkpoint.load_model(directory, numerics, spread(architecture, free))
    head = model.get_output_embeddings()
    for called in (model,) if head is None else (model.base_model, head):
        answer_on(called, own_device())
    return model


def spread(model: PreTrainedModel, free: Mapping[int, int]) -> dict[str, int | str]:
    """Which GPU takes which modules: about as much each, no layer on two of them.

    Args:
        model: the architecture; its weights may be on the meta device.
        free: bytes of weights that each of the GPUs takes, by its number.

    Raises:
        ConfigError: they are too few.
    """
    whole = list(model._no_split_modules or ())  # pyright: ignore[reportPrivateUsage]  (how transformers tells it)
    room: Any = dict(free)
    found: dict[str, Any] = infer_auto_device_map(
        model, get_balanced_memory(model, room, whole) if len(free) > 1 else room, whole
    )
    if not set(found.values()) <= set(free):
        size = sum(parameter.nbytes for parameter in model.parameters())
        raise ConfigError(
            f"recover.teacher_gpus={len(free)}: the dense model has {size / 2**30:.1f} GiB of weights and "
            f"{sum(free.values()) / 2**30:.1f} GiB are free; raise recover.teacher_gpus or lower model.dtype"
        )
    return found


def answer_on(module: torch.nn.Module, device: torch.device) -> None:
    """Have a module take its inputs from a device other than its own, and give its outputs there."""
    own = next(module.parameters()).device

    def enter(_module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return send_to_device(args, own), send_to_device(kwargs, own)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(lambda _module, _args, output: send_to_device(output, device))
