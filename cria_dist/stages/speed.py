"""How fast a model runs and how much memory it takes: one example alone, and several together.

Shapes: B examples, T tokens.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

BATCH = 8
"""Examples that go through the model together, beside one alone."""
DECODED_TOKENS = 16
PROMPT_TOKENS = 32
"""Tokens that are in the cache before the timed ones are decoded."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Median or single measurement of one model; the names are those of :class:`cria_dist.records.Evaluation`.

    Attributes:
        prefill_ms: one forward pass over one example.
        batch_prefill_ms: the same over ``BATCH`` examples together.
        memory_bytes: weights as they compute, and the cache that the ``BATCH`` examples leave.
        decode_ms: one further token of one sequence; None for a classifier, which does not decode.
        batch_decode_ms: one further token of each of ``BATCH`` sequences.
    """

    prefill_ms: float
    batch_prefill_ms: float
    memory_bytes: int
    decode_ms: float | None = None
    batch_decode_ms: float | None = None

    def known(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure(model: PreTrainedModel, inputs: dict[str, torch.Tensor], decodes: bool) -> Speed:
    """Time a model on its device with the threads that torch has now.

    Args:
        model: ready for inference.
        inputs: keyword arguments with ``BATCH`` rows each, ``input_ids`` [B, T] among them if it decodes.
        decodes: whether it writes text, token by token.

    Returns:
        One measurement of each.
    """
    many = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    one = {name: tensor[:1] for name, tensor in many.items()}
    with torch.inference_mode():
        prefill_ms, _ = _forward(model, one)
        batch_prefill_ms, cache_bytes = _forward(model, many)
        found = Speed(prefill_ms, batch_prefill_ms, _weights(model) + cache_bytes)
        if decodes:
            alone, together = (decode_ms(model, tokens["input_ids"][:, :PROMPT_TOKENS]) for tokens in (one, many))
            found = replace(found, decode_ms=alone, batch_decode_ms=together)
    return found


def forward_ms(model: PreTrainedModel, tokens_BT: torch.Tensor) -> float:
    """Milliseconds of a forward pass."""
    return _forward(model, {"input_ids": tokens_BT})[0]


def decode_ms(model: PreTrainedModel, prompt_BT: torch.Tensor) -> float:
    """Milliseconds per step of greedy decoding; what the prompt costs is left out."""
    started = model(input_ids=prompt_BT, use_cache=True)
    first_B1 = started.logits[:, -1:].argmax(dim=-1)

    def steps() -> None:
        tokens_B1 = first_B1
        for _ in range(DECODED_TOKENS):
            found = model(input_ids=tokens_B1, past_key_values=started.past_key_values, use_cache=True)
            tokens_B1 = found.logits[:, -1:].argmax(dim=-1)

    return _milliseconds(steps) / DECODED_TOKENS


def step_ms(model: PreTrainedModel, prompt_BT: torch.Tensor) -> float:
    """Milliseconds of one further token, whichever: also of a model without its head, which chooses none."""
    cache = model(input_ids=prompt_BT, use_cache=True).past_key_values
    token_B1 = prompt_BT[:, -1:]

    def steps() -> None:
        for _ in range(DECODED_TOKENS):
            model(input_ids=token_B1, past_key_values=cache, use_cache=True)

    return _milliseconds(steps) / DECODED_TOKENS


def _forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Milliseconds of a pass after a short one, and the bytes of the cache it leaves."""
    model(**{name: tensor[:, :PROMPT_TOKENS] if tensor.ndim == 2 else tensor for name, tensor in inputs.items()})
    outputs: list[Any] = []
    milliseconds = _milliseconds(lambda: outputs.append(model(**inputs)))
    cache = getattr(outputs[0], "past_key_values", None)
    layers = [] if cache is None else cache.layers
    return milliseconds, sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


def _milliseconds(action: Callable[[], object]) -> float:
    """Wall time of an action, until the GPU has finished it too."""
    _wait()
    started = time.perf_counter()
    action()
    _wait()
    return 1e3 * (time.perf_counter() - started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _weights(model: PreTrainedModel) -> int:
    """Bytes of the weights in memory, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())
