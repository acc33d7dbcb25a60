"""What a recovery minimises: cross entropy of the next token or of the label (with a teacher: ``stages/distil.py``).

Shapes: S sequences or examples, T tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from cria_dist.stages.examples import Data, Examples

Objective = Callable[[PreTrainedModel, Data, float], float]
"""Called with model, tokens [S, T] or examples, and a share: adds the gradients of that share of the mean loss per
token or label to those the parameters have, and returns that share of the loss."""


def mean_loss(model: PreTrainedModel, data: Data) -> torch.Tensor:
    """Mean cross entropy of the next token, or of the labels of examples."""
    return label_loss(model, data) if isinstance(data, Examples) else next_token_loss(model, data)


def label_loss(model: PreTrainedModel, examples: Examples) -> torch.Tensor:
    """Mean cross entropy of the labels."""
    inputs, labels_S = examples.tensors(model.device)
    return torch.nn.functional.cross_entropy(model(**inputs).logits.float(), labels_S)


def next_token_loss(model: PreTrainedModel, tokens_ST: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    tokens_ST = tokens_ST.to(model.device)
    logits = model(input_ids=tokens_ST, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens_ST[:, 1:].flatten())


def cross_entropy(model: PreTrainedModel, data: Data, share: float) -> float:
    """The objective without a teacher; logits, [S, T, V] in float32, their logarithms and gradients are whole."""
    loss = mean_loss(model, data) * share
    loss.backward()
    return float(loss.detach())
