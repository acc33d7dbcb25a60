"""Weights that are zero stay zero while the others are trained."""

from collections.abc import Collection

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
            parameter.register_hook(lambda gradient, there=there: gradient * there)
