"""Distillation: what it computes, what it leaves alone, and how little memory it takes."""

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.family import FAMILIES
from cria_dist.stages import distil
from cria_dist.stages.distil import Distillation
from cria_dist.stages.recover_loss import Objective, cross_entropy

LANGUAGE_FAMILIES = [name for name, family in FAMILIES.items() if family.takes == "tokens"]
GENERIC_FAMILIES = ["cohere", "ernie4_5", "granite", "helium", "olmo2", "seed_oss", "smollm3", "stablelm"]
VOCABULARY = 300

Pair = tuple[PreTrainedModel, PreTrainedModel]


def load_pair(directory: Path, dtype: str = "float32") -> Pair:
    """A student that differs from its teacher."""
    student, teacher = (checkpoint.load_model(directory, checkpoint.Numerics(kind)) for kind in ("float32", dtype))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student, teacher


@pytest.fixture
def tokens_ST() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20)))


@pytest.fixture
def make_pair(make_model: Callable[..., Path], tmp_path: Path) -> Callable[[str, bool], Pair]:
    """Of a family, with its head tied to the embedding or not; some squash their logits, some scale them."""

    def make(model_type: str, tied: bool) -> Pair:
        squashed = {"final_logit_softcapping": 2.0} if model_type.startswith("gemma") else {}
        squashed |= {"logits_scaling": 8.0} if model_type in ("granite", "hyperclovax") else {}
        return load_pair(make_model(tmp_path / "model", model_type, tie_word_embeddings=tied, **squashed))

    return make


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_definition(pair: Pair, tokens_ST: torch.Tensor, weight: float, temperature: float) -> torch.Tensor:
    """Whole logits by the stock forward pass, the divergence as a sum over the vocabulary, in float64."""
    student_NV, teacher_NV = (model(input_ids=tokens_ST).logits[:, :-1].double().flatten(0, 1) for model in pair)
    logs_N = student_NV.log_softmax(-1).gather(1, tokens_ST[:, 1:].reshape(-1, 1))
    soft_NV, taught_NV = (student_NV / temperature).softmax(-1), (teacher_NV / temperature).softmax(-1)
    divergence_N = (taught_NV * (taught_NV / soft_NV).log()).sum(-1)
    return (1 - weight) * -logs_N.mean() + weight * temperature**2 * divergence_N.mean()


@pytest.mark.parametrize(
    ("model_type", "chunk", "tied"),
    [
        *itertools.product(LANGUAGE_FAMILIES, (1, 1000), (True,)),
        *itertools.product([*LANGUAGE_FAMILIES, *GENERIC_FAMILIES, "hyperclovax"], (7,), (False,)),
    ],
)
def test_loss_and_gradients_are_those_of_the_definition(
    model_type: str,
    chunk: int,
    tied: bool,
    make_pair: Callable[[str, bool], Pair],
    tokens_ST: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every family, whatever it does to its logits; with the head trained, too."""
    pair = make_pair(model_type, tied)
    monkeypatch.setattr(distil, "CHUNK_LOGITS", chunk * VOCABULARY)
    loss = Distillation(pair[1], weight=0.3, temperature=2.0)(pair[0], tokens_ST, share=0.25)
    found = gradients(pair[0])
    wanted = 0.25 * by_definition(pair, tokens_ST, 0.3, 2.0)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    expected = gradients(pair[0])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # plus rounding: the gradient of a key's bias is zero
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-8), name


def test_a_head_of_an_unknown_kind_teaches_nobody(make_pair: Callable[[str, bool], Pair]) -> None:
    model = make_pair("llama", True)[1]
    distil.check_head(model)
    model.config.logits_scaling = 4.0  # which the stock class does not heed
    with pytest.raises(ConfigError, match=r"head of model_type 'llama' does something .*set recover\.distill=0 and"):
        distil.check_head(model)


def test_a_divergence_by_hand() -> None:
    """A teacher of even odds, a student of 3 to 1: KL = ln(2 / sqrt(3)); at temperature 2 the odds are sqrt(3) to 1."""
    student_CV, teacher_CV = torch.tensor([[np.log(3.0), 0.0]]), torch.zeros(1, 2)
    for temperature, odds in ((1.0, 3.0), (2.0, 3.0**0.5)):
        found = distil.divergence(student_CV, teacher_CV, temperature)
        assert float(found) == pytest.approx(np.log((1 + odds) / (2 * odds**0.5)), rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(pico: Path, tokens_ST: torch.Tensor) -> None:
    student, teacher = (checkpoint.load_model(pico, checkpoint.Numerics()) for _ in range(2))
    assert Distillation(teacher, 1.0, 2.0)(student, tokens_ST, 1.0) == pytest.approx(0, abs=1e-6)
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in gradients(student).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_stays_as_it_is(dtype: str, pico: Path, tokens_ST: torch.Tensor) -> None:
    student, teacher = load_pair(pico, dtype)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    Distillation(teacher.train(), 0.5, 1.0)(student, tokens_ST, 1.0)
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {getattr(torch, dtype)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert {gradient.dtype for gradient in gradients(student).values()} == {torch.float32}


class LogitsAlive(TorchDispatchMode):
    """Counts the bytes of tensors whose last dimension is the vocabulary, as they come and go; not of the heads."""

    def __init__(self, *models: PreTrainedModel) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._weights = {p.untyped_storage()._cdata for model in models for p in model.parameters()}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == VOCABULARY:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or key in self._weights:
            return
        self._alive[key] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, key)
        self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self._alive.values()))


@pytest.mark.parametrize("length", [65, 257])
def test_logits_are_never_whole(
    length: int, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen tokens at a time, however many there are; without a teacher the logits of all tokens exist at once."""
    model = make_model(tmp_path / "model", max_position_embeddings=512, tie_word_embeddings=False)
    student, teacher = load_pair(model)
    student.get_output_embeddings().requires_grad_(False)
    monkeypatch.setattr(distil, "CHUNK_LOGITS", 16 * VOCABULARY)
    chunk, whole = (4 * tokens * VOCABULARY for tokens in (16, length - 1))
    tokens_ST = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, length)))

    def measured(objective: Objective) -> LogitsAlive:
        with LogitsAlive(student, teacher) as logits:
            objective(student, tokens_ST, 1.0)
        return logits

    chunked, plain = measured(Distillation(teacher, 0.5, 2.0)), measured(cross_entropy)
    assert chunked.largest == chunk
    assert 3 * chunk < chunked.peak <= 11 * chunk  # 10 measured
    assert plain.largest >= whole
    assert plain.peak >= 2 * whole  # 3 measured


def test_without_distillation_the_settings_are_those_of_before() -> None:
    """Digests of runs are made of them."""
    there = {"steps", "batch_sequences", "sequence_length", "learning_rate", "train", "checkpoint_every"}
    plain, distilling = RecoverConfig(distill=0, temperature=3), RecoverConfig(distill=0.5, temperature=3)
    assert plain.content_part().keys() == there
    assert distilling.content_part() == {**plain.content_part(), "distill": 0.5, "temperature": 3.0}


@pytest.mark.parametrize(
    "wrong", [{"distill": -0.1}, {"distill": 1.1}, {"distill": np.nan}, {"temperature": 0}, {"temperature": np.inf}]
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RecoverConfig.model_validate(wrong)
