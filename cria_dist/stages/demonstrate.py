"""Demonstrate: how fast the variants of a model run, and what language models write."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cria_dist.models import checkpoint
from cria_dist.records import Generation
from cria_dist.stages import speed
from cria_dist.stages.evaluate import Variant
from cria_dist.stages.examples import model_inputs
from cria_dist.stages.speed import Speed


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the latency and the example texts are measured on.

    Attributes:
        tokens_path: test tokens or examples; the speed is measured on the first ones.
        numerics: how the models compute.
        prompts: prompts of the example texts.
        new_tokens: tokens per example.
        threads: CPU threads, all of the machine's, because nothing else runs meanwhile.
        writes: whether the models write text; classifiers do not.
    """

    tokens_path: Path
    numerics: checkpoint.Numerics
    prompts: tuple[str, ...]
    new_tokens: int
    threads: int
    writes: bool = True


@dataclass(frozen=True, slots=True)
class Shown:
    """What one variant did."""

    speed: Speed | None
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Visit:
    """One repeat of one variant: what is timed, what writes texts, or both."""

    variant: Variant
    repeat: int
    write_texts: bool
    timed: bool = True

    def __str__(self) -> str:
        """Name of the work item."""
        return f"time {self.variant.label}, repeat {self.repeat}"


class Demonstrator:
    """Times one variant once per call (so that the caller can alternate), and writes the example texts."""

    def __init__(self, task: Demonstration) -> None:
        self._task = task
        first = np.load(task.tokens_path, mmap_mode="r", allow_pickle=False)[: speed.BATCH]
        self._inputs = model_inputs(first[np.arange(speed.BATCH) % len(first)])

    def __call__(self, visit: Visit) -> Shown:
        """One timed visit of one variant, after a warm-up pass, with all threads of the machine."""
        usual = torch.get_num_threads()
        torch.set_num_threads(self._task.threads)
        try:
            return self._visit(visit)
        finally:
            torch.set_num_threads(usual)

    def _visit(self, visit: Visit) -> Shown:
        model = visit.variant.load(self._task.numerics)
        measured = speed.measure(model, self._inputs, self._task.writes) if visit.timed else None
        texts = self._texts(model, visit.variant.model_dir) if visit.write_texts and self._task.writes else ()
        return Shown(measured, texts)

    def _texts(self, model: PreTrainedModel, directory: Path) -> tuple[str, ...]:
        tokenizer = checkpoint.load_tokenizer(directory)
        return tuple(complete(model, tokenizer, prompt, self._task.new_tokens) for prompt in self._task.prompts)


def alternating_visits(variants: Sequence[Variant], repeats: int) -> list[Visit]:
    """Dense, pruned, repaired, dense, pruned, ...: machine drift hits all alike. Texts are written once."""
    turns = range(max(repeats, 1))
    return [Visit(variant, repeat, repeat == 0, repeats > 0) for repeat in turns for variant in variants]


def summary(shown: Mapping[Visit, Shown]) -> dict[str, dict[str, object]]:
    """Medians and texts per variant label, as plain data."""
    visits: dict[str, list[Shown]] = {}
    for visit, one in shown.items():
        visits.setdefault(visit.variant.label, []).append(one)
    return {
        "times": {label: medians(mine) for label, mine in visits.items()},
        "texts": {label: next((one.texts for one in mine if one.texts), ()) for label, mine in visits.items()},
    }


def medians(shown: Sequence[Shown]) -> dict[str, float]:
    """Medians over the visits of one variant, as far as there is anything to measure."""
    measured = [one.speed.known() for one in shown if one.speed is not None]
    names = measured[0] if measured else ()
    return {name: statistics.median_low([one[name] for one in measured]) for name in names}


def generations(texts: Mapping[str, Sequence[str]], prompts: Sequence[str]) -> tuple[Generation, ...]:
    """Example texts of all variants side by side."""
    return tuple(
        Generation(prompt, {label: answers[index] for label, answers in texts.items()})
        for index, prompt in enumerate(prompts)
        if any(texts.values())
    )


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = _greedy(model, encoded["input_ids"], new_tokens)
    return str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def _greedy(model: PreTrainedModel, prompt_1T: torch.Tensor, new_tokens: int) -> torch.Tensor:
    return model.generate(  # pyright: ignore[reportReturnType,reportCallIssue]  (untyped mixin; a tensor unless a dict is asked for)
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
