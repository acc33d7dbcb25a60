"""Milliseconds of a model's layers at several widths, measured: what a unit costs where the budget is time.

A model of a few layers of the real shapes is built with random weights (time does not depend on their values) and
pruned evenly in memory; every width is timed in turns with the whole one, so that drift hits both. Layers are timed
without the output head: in SmolLM2-135M it takes as long as ten of them, and its noise would be theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from transformers import AutoConfig, PreTrainedModel

from cria_dist import files
from cria_dist.models import checkpoint, depth
from cria_dist.models.device import own_device
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, pruned_copy
from cria_dist.records import Site
from cria_dist.stages import speed

Phase = Literal["prefill", "decode"]
LAYERS = 4
"""Layers of the timed model: enough that one layer stands out from embedding and head."""
TURNS = 7


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What was measured, of a model whose layers are alike.

    Attributes:
        model_ms: the whole model.
        layer_ms: one layer with all its units.
        parts: for each part of a layer, its widths in ascending order, and what it takes at each in milliseconds more
            than at the least of them.
    """

    model_ms: float
    layer_ms: float
    parts: Mapping[str, tuple[tuple[int, float], ...]]


@dataclass(frozen=True, slots=True)
class TimingTask:
    """What is timed.

    Attributes:
        config: config.json of a model whose layers are alike.
        widths: for each part, the widths to measure, the whole one last.
        phase: a forward pass over one sequence, or one further token after it.
        length: tokens of the sequence.
        numerics: how the model computes.
        threads: CPU threads; all of the machine's, because nothing else runs meanwhile.
        path: where the result goes.
    """

    config: Mapping[str, Any]
    widths: Mapping[str, tuple[int, ...]]
    phase: Phase
    length: int
    numerics: checkpoint.Numerics
    threads: int
    path: Path


class LayerTimer:
    """Times the layers of one model.

    Args:
        task: what is timed.
    """

    def __init__(self, task: TimingTask) -> None:
        self._task = task
        self._run = speed.forward_ms if task.phase == "prefill" else speed.step_ms

    def __call__(self, item: str) -> LayerTimes:
        """Measure, and write the result; ``item`` names the work."""
        usual = torch.get_num_threads()
        torch.set_num_threads(self._task.threads)
        torch.set_float32_matmul_precision(self._task.numerics.matmul)
        try:
            times = layer_times(self._task, self._ratio)
        finally:
            torch.set_num_threads(usual)
        files.write_json(self._task.path, asdict(times))
        return times

    def _ratio(self, whole: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
        """Milliseconds of two models in turns, the least of each: what disturbs a measurement only adds to it."""
        tokens_1T = torch.zeros(1, self._task.length, dtype=torch.int64, device=whole.device)
        with torch.inference_mode():
            turns = [(self._run(whole, tokens_1T), self._run(other, tokens_1T)) for _ in range(TURNS)]
        first, second = (min(values) for values in zip(*turns, strict=True))
        return first, second


def layer_times(
    task: TimingTask, measure: Callable[[PreTrainedModel, PreTrainedModel], tuple[float, float]]
) -> LayerTimes:
    """The table, from milliseconds of two models measured in turns, both with a head or both without."""
    layers = int(task.config["num_hidden_layers"])
    whole, single = (_random_model(task, count) for count in (min(LAYERS, layers), 1))
    count = int(whole.config.num_hidden_layers)
    whole_ms, single_ms = measure(_body(whole), _body(single))
    layer_ms = max(whole_ms - single_ms, 0.0) / max(count - 1, 1)
    with_head_ms, without_ms = measure(single, _body(single))
    model_ms = single_ms + (layers - 1) * layer_ms + max(with_head_ms - without_ms, 0.0)
    parts: dict[str, tuple[tuple[int, float], ...]] = {}
    for part, widths in task.widths.items():
        taken = {widths[-1]: layer_ms}
        for width in widths[:-1]:
            before, after = measure(_body(whole), _body(_narrowed(task, whole, {part: width})))
            taken[width] = layer_ms - whole_ms * (1 - after / before) / count
        parts[part] = _rising(taken)
    return LayerTimes(model_ms, layer_ms, parts)


def _rising(taken: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Times by width, counted from the least width's; the nearest in least squares that never fall."""
    widths = sorted(taken)
    fitted = isotonic_regression(np.array([taken[width] for width in widths])).x
    return tuple(zip(widths, (fitted - fitted[0]).tolist(), strict=True))


def _random_model(task: TimingTask, layers: int) -> PreTrainedModel:
    """The first layers of the architecture, on the device of this process."""
    config = depth.shallower(task.config, tuple(range(layers)), family_of(task.config).width_key)
    device = own_device()
    model = checkpoint.stock_class(config).from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    return model.to(device, getattr(torch, task.numerics.dtype)).eval()


def _body(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    return cast(PreTrainedModel, model.base_model)


def _narrowed(task: TimingTask, whole: PreTrainedModel, widths: Mapping[str, int]) -> PreTrainedModel:
    """The timed model with fewer units of some parts in every layer."""
    count, family = int(whole.config.num_hidden_layers), family_of(task.config)
    kept = {Site(layer, part).key: tuple(range(width)) for layer in range(count) for part, width in widths.items()}
    config = depth.shallower(task.config, tuple(range(count)), family.width_key)
    return pruned_copy(whole, Surgery(family, config, kept))
