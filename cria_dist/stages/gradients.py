"""Gradients: one shard of calibration sequences at a time through the whole model and back, kept as sums per unit.

Shapes: S sequences, T tokens, N units of a site.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cria_dist.errors import ConfigError, NumericError
from cria_dist.methods import GradientSample
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.stacks import ONE_MAP, Stack
from cria_dist.records import Float64, Site
from cria_dist.stages.examples import Data, read_examples
from cria_dist.stages.recover_loss import mean_loss
from cria_dist.store.saliences import Saliences


@dataclass(frozen=True, slots=True)
class GradientShard:
    """One work item: sequences ``start`` to ``stop - 1``, whose mean loss one gradient is of."""

    number: int
    start: int
    stop: int

    def __str__(self) -> str:
        """As in messages and logs."""
        return f"gradients of shard {self.number}"


def cut(sample: GradientSample) -> tuple[GradientShard, ...]:
    """The shards of a sample; they do not depend on the workers."""
    starts = range(0, sample.sequences, sample.shard_sequences)
    return tuple(
        GradientShard(number, start, min(start + sample.shard_sequences, sample.sequences))
        for number, start in enumerate(starts)
    )


@dataclass(frozen=True, slots=True)
class GradientTask:
    """What every worker is told.

    Attributes:
        model_dir: checkpoint to take gradients of.
        tokens_path: calibration tokens, int32 [S, T], or examples.
        numerics: how the model computes.
        saliences: where the sums go.
        parts: parts of a layer whose units are scored.
        labels_path: labels of the examples; None for a language model.
    """

    model_dir: Path
    tokens_path: Path
    numerics: checkpoint.Numerics
    saliences: Saliences
    parts: tuple[str, ...] = ("mlp",)
    labels_path: Path | None = None


class GradientTaker:
    """Holds the whole model and the gradients of its coupled tensors; called once per shard.

    On a CPU the same shard gives the same bytes; on a GPU the backward pass of fused attention may differ in the last
    bits from run to run.
    """

    def __init__(self, task: GradientTask) -> None:
        self._task = task
        config = checkpoint.read_config(task.model_dir)
        self._family = family = family_of(config)
        self._model = checkpoint.load_model(task.model_dir, task.numerics).requires_grad_(False)
        stored = {family.on_disk(name): parameter for name, parameter in self._model.named_parameters()}
        self._widths = family.widths(config, task.parts)
        self._coupled = {
            site: [
                (stored[name].requires_grad_(), dim, family.maps_in(name, site, config))
                for name, dim in family.coupled_tensors(site, config).items()
            ]
            for site in self._widths
        }

    def __call__(self, shard: GradientShard) -> int:
        """Write the saliences of a shard; returns the tokens (or examples) that went through the model.

        Raises:
            NumericError: a gradient is not finite; the message names shard and site.
            ConfigError: the GPU has too little memory.
        """
        data = self._data(shard)
        self._model.zero_grad(set_to_none=True)
        try:
            for one in data.split(1):  # gradients add up; one sequence at a time takes the least memory
                (mean_loss(self._model, one) / len(data)).backward()
            self._task.saliences.write(shard.number, {site: self._salience(shard, site) for site in self._coupled})
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{shard}: out of GPU memory; gradients take the whole model, a copy of its MLPs and one sequence's "
                "activations on one device: lower data.sequence_length, set model.dtype=bfloat16, or choose a method "
                "without gradients"
            ) from error
        return data.numel() if isinstance(data, torch.Tensor) else len(data)

    def _data(self, shard: GradientShard) -> Data:
        if self._task.labels_path is not None:
            return read_examples(self._task.tokens_path, self._task.labels_path)[shard.start : shard.stop]
        tokens_ST = np.load(self._task.tokens_path, mmap_mode="r", allow_pickle=False)[shard.start : shard.stop]
        return torch.from_numpy(tokens_ST.astype(np.int64))

    def _salience(self, shard: GradientShard, site: Site) -> Float64:
        parts = [unit_salience(one, dim, self._widths[site], maps) for one, dim, maps in self._coupled[site]]
        values_N = torch.stack(parts).sum(dim=0).cpu().numpy()
        broken = values_N.size - np.isfinite(values_N).sum()
        if broken:
            raise NumericError(
                f"{shard}, {site.key}: the gradients of {broken} of {values_N.size} units are not finite; "
                "set model.dtype=float32, or check the weights of the model"
            )
        return values_N


def unit_salience(parameter: torch.Tensor, dim: int, units: int, stack: Stack = ONE_MAP) -> torch.Tensor:
    """``sum |w * dL/dw|`` over the weights of each unit, float64 [N].

    Args:
        parameter: a tensor with its gradient.
        dim: the dimension the units lie along, each with the same number of rows.
        units: how many there are.
        stack: the maps in the tensor.
    """
    if parameter.grad is None:
        raise TypeError("the parameter took no part in the loss")
    product = parameter.detach().double() * parameter.grad.double()
    maps = stack.split(product.abs().movedim(dim, 0), units)
    return torch.stack([one.reshape(units, -1).sum(dim=1) for one in maps]).sum(dim=0)
