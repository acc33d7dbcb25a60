"""Weights that are zero stay zero while the others are trained."""

import functools
from collections.abc import Collection

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def hold_zeros(model: PreTrainedModel, names: Collection[str]) -> None:
    """Take the gradient from every weight that is zero now.

    Without a gradient AdamW's moments of a weight stay zero, and so does its step; weight decay of zero is zero.

    Args:
        model: model before its first step.
        names: parameters, by their names in memory, whose zeros are held.
    """
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.requires_grad:
            there = parameter.detach() != 0
            if isinstance(parameter, DTensor):  # its gradient is not autograd's but what the workers add up
                parameter.register_post_accumulate_grad_hook(functools.partial(_mask_gradient, there))
            else:
                parameter.register_hook(lambda gradient, there=there: gradient * there)


def _mask_gradient(there: torch.Tensor, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad *= there
