"""Demonstrate: how fast the variants of a model run, and what language models write."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cria_dist.models import checkpoint
from cria_dist.records import Generation
from cria_dist.stages.evaluate import Variant
from cria_dist.stages.examples import model_inputs

DECODED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the latency and the example texts are measured on.

    Attributes:
        tokens_path: test tokens or examples; the first sequence is the prompt of the latency measurement.
        numerics: how the models compute.
        prompts: prompts of the example texts.
        new_tokens: tokens per example.
        threads: CPU threads, all of the machine's, because nothing else runs meanwhile.
        examples: the first so many test examples go through a classifier together; 0 for a language model.
    """

    tokens_path: Path
    numerics: checkpoint.Numerics
    prompts: tuple[str, ...]
    new_tokens: int
    threads: int
    examples: int = 0


@dataclass(frozen=True, slots=True)
class Shown:
    """What one variant did: milliseconds (prefill, decode per token; a classifier does not decode) and the texts."""

    prefill_ms: float
    decode_ms: float | None
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Visit:
    """One repeat of one variant."""

    variant: Variant
    repeat: int
    write_texts: bool

    def __str__(self) -> str:
        """Name of the work item."""
        return f"time {self.variant.label}, repeat {self.repeat}"


class Demonstrator:
    """Times one variant once per call (so that the caller can alternate), and writes the example texts."""

    def __init__(self, task: Demonstration) -> None:
        self._task = task
        inputs = np.load(task.tokens_path, mmap_mode="r", allow_pickle=False)[: task.examples or 1]
        self._inputs = model_inputs(inputs)

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
        if self._task.examples:
            return self._classify(model)
        prompt_1T = self._inputs["input_ids"].to(model.device)
        with torch.inference_mode():
            model(input_ids=prompt_1T[:, :32])
            prefill = _seconds(lambda: model(input_ids=prompt_1T))
            decode = _seconds(lambda: _greedy(model, prompt_1T[:, :32], DECODED_TOKENS))
        texts = self._texts(model, visit.variant.model_dir) if visit.write_texts else ()
        return Shown(1e3 * prefill, 1e3 * decode / DECODED_TOKENS, texts)

    def _classify(self, model: PreTrainedModel) -> Shown:
        inputs = {name: tensor.to(model.device) for name, tensor in self._inputs.items()}
        with torch.inference_mode():
            model(**inputs)
            return Shown(1e3 * _seconds(lambda: model(**inputs)), None, ())

    def _texts(self, model: PreTrainedModel, directory: Path) -> tuple[str, ...]:
        tokenizer = checkpoint.load_tokenizer(directory)
        return tuple(complete(model, tokenizer, prompt, self._task.new_tokens) for prompt in self._task.prompts)


def alternating_visits(variants: Sequence[Variant], repeats: int) -> list[Visit]:
    """Dense, pruned, repaired, dense, pruned, ...: machine drift hits all alike. Texts are written once."""
    return [Visit(variant, repeat, repeat == 0) for repeat in range(max(repeats, 1)) for variant in variants]


def summary(shown: Mapping[Visit, Shown], timed: bool) -> dict[str, dict[str, object]]:
    """Medians (if asked for) and texts per variant label, as plain data."""
    visits: dict[str, list[Shown]] = {}
    for visit, one in shown.items():
        visits.setdefault(visit.variant.label, []).append(one)
    return {
        "times": {label: medians(mine) for label, mine in visits.items()} if timed else {},
        "texts": {label: next((one.texts for one in mine if one.texts), ()) for label, mine in visits.items()},
    }


def medians(shown: Sequence[Shown]) -> dict[str, float]:
    """Median prefill and decode milliseconds over the visits of one variant, as far as there are any."""
    decodes = [one.decode_ms for one in shown if one.decode_ms is not None]
    return {
        "prefill_ms": statistics.median(one.prefill_ms for one in shown),
        **({"decode_ms": statistics.median(decodes)} if decodes else {}),
    }


def generations(texts: Mapping[str, Sequence[str]], prompts: Sequence[str]) -> tuple[Generation, ...]:
    """Example texts of all variants side by side."""
    return tuple(
        Generation(prompt, {label: answers[index] for label, answers in texts.items()})
        for index, prompt in enumerate(prompts)
        if any(texts.values())
    )


def _seconds(action: Callable[[], object]) -> float:
    """Wall time of an action, until the GPU has finished it too."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
