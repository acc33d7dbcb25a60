"""Distil: a recovery in which the pruned model also learns from the dense one's distributions.

Shapes: S sequences, T tokens, N predicted tokens (S * (T - 1)), C tokens of a chunk, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.errors import ConfigError
from cria_dist.models.device import own_device
from cria_dist.stages import recover_loss
from cria_dist.stages.distil_hidden import Hidden, paired_states
from cria_dist.stages.distil_teacher import Teacher, load_teacher
from cria_dist.stages.examples import Data, Examples
from cria_dist.stages.recover_loss import Objective
from cria_dist.stages.recover_shards import decode
from cria_dist.stages.recover_step import Place

MULTIPLIES = ("hyperclovax",)
"""Model types whose logits are multiplied by ``logits_scaling``, by which Granite's are divided."""
CHECKED_TOKENS = 8
HEAD_TOLERANCE = 0.02
"""Of the largest logit; two kernels differ by less in half precision, and a scale that is left out by more."""
CHUNK_LOGITS = 2**22
"""Logits of one model that exist at a time, 16 MiB in float32 whatever the vocabulary and the sequence."""


def objective_of(
    config: RecoverConfig, teacher: Teacher | None, matmul: str, labelled: bool, place: Place
) -> Objective:
    """What a recipe minimises on text or labelled examples; where it distils, the teacher is loaded.

    Args:
        config: recipe.
        teacher: the dense model.
        matmul: precision of its float32 matrix products.
        labelled: whether examples have labels.
        place: this worker.

    Raises:
        ConfigError: the recipe distils and there is no teacher, or no room for it, or its head is of an unknown kind.
    """
    if not config.distills:
        return recover_loss.cross_entropy
    if teacher is None:
        name = "distill" if config.distill else "distill_hidden"
        raise ConfigError(
            f"recover.{name}={getattr(config, name)} needs the dense model and none was given; set it to 0"
        )
    model = load_teacher(teacher, config, matmul, place)
    if labelled:
        return LabelDistillation(model, config.distill, config.temperature)
    check_head(model)
    pairs = paired_states(teacher.layers, model.config.num_hidden_layers, config) if config.distill_hidden else ()
    return Distillation(model, config.distill, config.temperature, Hidden(config.distill_hidden, pairs))


class Distillation:
    """``(1 - weight) * cross entropy + weight * temperature^2 * KL(teacher || student)``, means over the tokens.

    To this comes ``hidden.weight`` times how far the hidden states are apart (:func:`relative_error`), a mean over the
    pairs of states.

    Neither model's logits ever exist as a whole: hidden states, [S, T, D], are turned into logits, loss and gradient a
    chunk of tokens at a time. At the peak ten arrays [C, V] are alive, each of at most ``CHUNK_LOGITS`` numbers: 168 MB
    for any sequence and vocabulary (without a teacher, three of [S, T, V] are).

    Args:
        teacher: the dense model; its parameters are frozen.
        weight: of the divergence, 0 to 1.
        temperature: both distributions are softened by it; its square keeps the gradients' size.
        hidden: what is compared of the hidden states.

    *Source:* Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531, section 2 (soft targets as a divergence,
    which differs from their cross entropy by the teacher's entropy, a constant).
    """

    def __init__(
        self, teacher: PreTrainedModel, weight: float, temperature: float, hidden: Hidden | None = None
    ) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._weight = weight
        self._temperature = temperature
        self._hidden = hidden or Hidden(0.0, ())

    def __call__(self, student: PreTrainedModel, tokens_ST: Data, share: float) -> float:
        """Add the gradients of ``share`` times the loss; returns that share of the loss."""
        if isinstance(tokens_ST, Examples):
            raise TypeError("labelled examples have an objective of their own")
        tokens_ST = tokens_ST.to(student.device)
        targets_N = tokens_ST[:, 1:].flatten()
        found, taught = (states(model, tokens_ST, self._hidden.weight > 0) for model in (student, self._teacher))
        hidden_ND, taught_ND = (one.last_hidden_state.flatten(0, 1) for one in (found, taught))
        size = max(1, CHUNK_LOGITS // student.config.vocab_size)
        total, slopes_ND = torch.zeros((), device=student.device), torch.zeros_like(hidden_ND)
        parts = (hidden_ND.detach(), slopes_ND, taught_ND, targets_N)
        for hidden_CD, slope_CD, taught_CD, targets_C in zip(*(part.split(size) for part in parts), strict=True):
            hidden_CD.requires_grad_().grad = slope_CD  # filled in place
            loss = self._loss(logits(student, hidden_CD), logits(self._teacher, taught_CD), targets_C)
            loss = loss * (share / len(targets_N))
            loss.backward()  # as far as the hidden states, and into the head where it is trained
            total += loss.detach()
        if not self._hidden.weight:
            hidden_ND.backward(slopes_ND)
            return float(total)
        apart = share * self._hidden.loss(found.hidden_states, taught.hidden_states)
        torch.autograd.backward([hidden_ND, apart], [slopes_ND, None])
        return float(total + apart.detach())

    def _loss(self, student_CV: torch.Tensor, teacher_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of a chunk."""
        exact = cross_entropy(student_CV, targets_C, reduction="sum")
        if not self._weight:
            return exact
        soft = divergence(student_CV, teacher_CV, self._temperature)
        return (1 - self._weight) * exact + self._weight * self._temperature**2 * soft


class LabelDistillation:
    """The same for a classifier: means over the examples of the cross entropy of their labels and of the divergence.

    Args:
        teacher: the dense model; its parameters are frozen.
        weight: of the divergence, 0 to 1.
        temperature: both distributions are softened by it.
    """

    def __init__(self, teacher: PreTrainedModel, weight: float, temperature: float) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._weight = weight
        self._temperature = temperature

    def __call__(self, student: PreTrainedModel, examples: Data, share: float) -> float:
        """Add the gradients of ``share`` times the loss; returns that share of the loss."""
        if not isinstance(examples, Examples):
            raise TypeError("text has an objective of its own")
        inputs, labels_S = examples.tensors(student.device)
        student_SV = student(**inputs).logits.float()
        exact = cross_entropy(student_SV, labels_S)
        soft = divergence(student_SV, self._teacher(**inputs).logits.float(), self._temperature) / len(labels_S)
        loss = share * ((1 - self._weight) * exact + self._weight * self._temperature**2 * soft)
        loss.backward()
        return float(loss.detach())


def divergence(student_CV: torch.Tensor, teacher_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of the distributions of logits over a temperature, summed over the tokens, in nats."""
    student_CV, teacher_CV = student_CV / temperature, teacher_CV / temperature
    return kl_div(student_CV.log_softmax(-1), teacher_CV.log_softmax(-1), reduction="sum", log_target=True)


def states(model: PreTrainedModel, tokens_ST: torch.Tensor, every: bool) -> Any:
    """``last_hidden_state``, from which the head predicts every token but the first, [S, T - 1, D].

    With ``every``, ``hidden_states`` too: what enters each layer, and what the head reads.
    """
    return decode(model, input_ids=tokens_ST[:, :-1], use_cache=False, output_hidden_states=every)


def logits(model: PreTrainedModel, hidden_CD: torch.Tensor) -> torch.Tensor:
    """The head as the stock class applies it, float32 [C, V]; Cohere and Granite scale its logits, Gemma squashes."""
    head, config = model.get_output_embeddings(), model.config
    found_CV = head(hidden_CD).float()  # pyright: ignore[reportOptionalCall]  (a causal language model has one)
    scaling = getattr(config, "logits_scaling", 1.0)
    divided = 1 / scaling if config.model_type in MULTIPLIES else scaling
    found_CV = found_CV * getattr(config, "logit_scale", 1.0) / divided
    cap = getattr(config, "final_logit_softcapping", None)
    return found_CV if cap is None else cap * torch.tanh(found_CV / cap)


def check_head(model: PreTrainedModel) -> None:
    """See that :func:`logits` are the stock class's, on a few tokens: a new family may do more with them.

    Raises:
        ConfigError: they are others.
    """
    tokens_ST = torch.arange(CHECKED_TOKENS + 1, device=own_device())[None] % model.config.vocab_size
    with torch.no_grad():
        stock_NV = model(input_ids=tokens_ST[:, :-1], use_cache=False).logits[0].float()
        ours_NV = logits(model, states(model, tokens_ST, every=False).last_hidden_state[0])
    apart = float((ours_NV - stock_NV).abs().max() / stock_NV.abs().max())
    if not apart <= HEAD_TOLERANCE:
        raise ConfigError(
            f"the output head of model_type {model.config.model_type!r} does something to its logits that is not known "
            f"here (they differ by {apart:.2g} of the largest), so nothing can be learned from it; set "
            "recover.distill=0 and recover.distill_hidden=0"
        )
