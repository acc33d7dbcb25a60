"""Memory of a recovery, by arithmetic: what a training worker holds beside the activations of its batch."""

import math

import torch

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.macs import MAPS
from cria_dist.models.mlp import ModelDict
from cria_dist.models.sizes import sizes_of
from cria_dist.stages.estimate_left import Left
from cria_dist.stages.footprint import itemsize
from cria_dist.stages.recover_model import Learning

TRAINED, FROZEN = 16, 4
"""Bytes of a parameter in float32: weight, gradient and two moments of one that learns, the weight of another."""


def training_workers(config: RunConfig) -> int:
    """Workers a recovery has."""
    return 1 if config.run.pool == "local" else config.recover.workers


def recovery_bytes(config: RunConfig, dense: ModelDict, left: Left) -> int:
    """Bytes of one training worker without activations.

    Workers that share everything out (``fsdp2``) still hold whole what is around the layers, from the forward to the
    end of the backward pass, and one layer with its gradient at a time. A dense model that lies elsewhere than beside
    the pruned one is not counted.

    Args:
        config: the run.
        dense: config.json of the dense model, which teaches.
        left: the pruned model.
    """
    recover, workers = config.recover, training_workers(config)
    model = checkpoint.empty_model(left.model_config)
    Learning(recover, config.prune.parts, config.seed).prepare(model)
    size = _student(model, recover, family_of(left.model_config).layers, left.parameters)
    teaches = recover.distills and recover.teacher == "beside" and not recover.teacher_gpus
    teacher = checkpoint.count_parameters(dense) * itemsize(config.model.dtype) * teaches
    if recover.strategy == "ddp" or workers == 1:
        return size + teacher
    sizes = sizes_of(dense, family_of(dense))
    around = sizes.parameters - sum(sizes.layers)
    whole = around * (FROZEN * (2 if recover.train == "all" else 1) + itemsize(config.model.dtype) * teaches)
    return math.ceil((size + teacher) / workers) + whole + 2 * FROZEN * max(sizes.layers)


def recovery_remedies(config: RunConfig) -> str:
    """What makes a recovery smaller, of what is not done yet."""
    recover = config.recover
    found = ["recover.strategy='fsdp2' with more workers" if recover.strategy == "ddp" else "more recover.workers"]
    found += ["recover.lora_rank"] * (not recover.lora_rank and config.method.unit != "weight")
    found += ["recover.teacher='cpu'"] * (recover.distills and recover.teacher == "beside" and not recover.teacher_gpus)
    return f"{', '.join(found)} or recover.steps=0"


def _student(model: torch.nn.Module, recover: RecoverConfig, layers: str, parameters: int) -> int:
    """Bytes of weights, gradients and moments.

    Args:
        model: as it will learn, on the meta device; as wide as the dense one where its widths are not known.
        recover: recipe.
        layers: name of its list of layers.
        parameters: those that are left, of which the ones that are gone would have learned.
    """
    if recover.lora_rank:
        maps = [one.weight for one in model.get_submodule(layers).modules() if isinstance(one, MAPS)]
        adapters = recover.lora_rank * sum(sum(one.shape) for one in maps if one.requires_grad)
        return FROZEN * parameters + TRAINED * adapters
    there = [(one.numel(), one.requires_grad) for one in model.parameters()]
    frozen = sum(size for size, learns in there if not learns)
    return FROZEN * frozen + TRAINED * max(0, parameters - frozen)
