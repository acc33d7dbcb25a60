"""What a recovery minimises: the cross entropy of the next token (with a teacher: ``stages/distil.py``).

Shapes: S sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

Objective = Callable[[PreTrainedModel, torch.Tensor, float], float]
"""Called with model, tokens [S, T] and a share: adds the gradients of that share of the mean loss per token to those
the parameters have, and returns that share of the loss."""


def next_token_loss(model: PreTrainedModel, tokens_ST: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    tokens_ST = tokens_ST.to(model.device)
    logits = model(input_ids=tokens_ST, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens_ST[:, 1:].flatten())


def cross_entropy(model: PreTrainedModel, tokens_ST: torch.Tensor, share: float) -> float:
    """The objective without a teacher; logits, [S, T, V] in float32, their logarithms and gradients are whole."""
    loss = next_token_loss(model, tokens_ST) * share
    loss.backward()
    return float(loss.detach())
