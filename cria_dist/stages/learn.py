"""Learn: a gate per unit is trained on the calibration tokens. Plain PyTorch; who starts several workers is outside.

The gates multiply what the output maps read, or are in the place of batch norm's scales. They are float64 while the
model is float32: a sequence's gradient is the same on any worker, and float64 adds them up the same in any order, so
the number of workers leaves no trace (with ``variant = "all"`` up to the rounding of the maps' gradients). Shapes: S
sequences, D tokens of one, N units of a site.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cria_dist.config import RecoverConfig
from cria_dist.errors import ConfigError, NumericError
from cria_dist.methods.gates import GateMethod
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.mlp import ModelDict
from cria_dist.records import Float64, Site
from cria_dist.stages.examples import Data, Examples, read_examples
from cria_dist.stages.norms import Norm, measured_norms, rescaled
from cria_dist.stages.recover_data import sequence_order, training_data
from cria_dist.stages.recover_log import append_log, cut_log
from cria_dist.stages.recover_loss import mean_loss
from cria_dist.stages.recover_step import Place, learning_rate
from cria_dist.store.gates import Gates


@dataclass(frozen=True, slots=True)
class LearnTask:
    """What every training worker is told.

    Attributes:
        model_dir: checkpoint whose units get gates.
        tokens_path: calibration tokens or examples.
        gates: where rank 0 puts what was learned.
        log_path: JSON line per step (step, loss without the penalty, penalty, seconds), written by rank 0.
        method: parametrisation, penalty and recipe.
        matmul: precision of float32 matrix products; weights are float32.
        seed: seed of the data order.
        labels_path: labels of the examples; None for a language model.
    """

    model_dir: Path
    tokens_path: Path
    gates: Gates
    log_path: Path
    method: GateMethod
    matmul: str
    seed: int
    labels_path: Path | None = None


def train(task: LearnTask, place: Place) -> None:
    """Learn the gates and, on rank 0, write them; the stage is short, so an interrupted one starts again.

    Raises:
        NumericError: the loss is not finite.
    """
    method = task.method
    # warm-up, decay and data order are those of the recovery
    recipe = RecoverConfig(steps=method.steps, workers=1, batch_sequences=method.batch_sequences, learning_rate=1.0)
    gated = GatedModel(task)
    data = training_data(task.tokens_path, task.labels_path, method.sequence_length)
    order = sequence_order(len(data), recipe, task.seed)
    if place.rank == 0:
        cut_log(task.log_path, 0)
    started = time.monotonic()
    for step, batch in enumerate(order):
        blocks = data[batch[place.rank :: place.world]]
        loss, penalty = gated.step(blocks, len(batch), learning_rate(step, recipe), place)
        if not math.isfinite(loss + penalty):
            raise NumericError(
                f"the loss of the gates is {loss} and the penalty {penalty} at step {step}; lower learning_rate of the "
                "method, or check the weights of the model"
            )
        if place.rank == 0:
            append_log(task.log_path, step=step + 1, loss=loss, penalty=penalty, seconds=time.monotonic() - started)
    if place.rank == 0:
        task.gates.write({site: learned_N.detach().cpu().numpy() for site, learned_N in gated.learned.items()})


class GatedModel:
    """A model with a gate on every unit, and the optimiser of what learns.

    Attributes:
        learned: what each site's gates are computed from, float64 [N].
    """

    def __init__(self, task: LearnTask) -> None:
        self._method = task.method
        config = checkpoint.read_config(task.model_dir)
        family = family_of(config)
        numerics = checkpoint.Numerics("float32", task.matmul)
        self._model = checkpoint.load_model(task.model_dir, numerics).requires_grad_(False)
        self.learned = self._attached(task, config)
        maps: list[torch.nn.Parameter] = []
        if task.method.variant == "all":
            coupled = {name for site in self.learned for name in family.coupled_tensors(site, config)}
            maps = [one for name, one in self._model.named_parameters() if family.on_disk(name) in coupled]
        self._trained: list[torch.Tensor] = [*self.learned.values(), *(one.requires_grad_() for one in maps)]
        self._rates = (task.method.learning_rate, task.method.weight_learning_rate)
        self._optimizer = torch.optim.Adam([{"params": [*self.learned.values()]}, {"params": maps}])

    def step(self, blocks: Data, batch: int, rate: float, place: Place) -> tuple[float, float]:
        """One optimiser step, this worker on its part of a batch; returns loss and penalty of the whole batch.

        Args:
            blocks: this worker's sequences, none of them if there are more workers than sequences.
            batch: sequences of all workers.
            rate: share of the learning rates.
            place: this worker.
        """
        for group, peak in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * peak
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        total = torch.zeros((), dtype=torch.float64, device=self._model.device)
        for index in range(len(blocks)):  # one sequence at a time takes the least memory
            loss = mean_loss(self._model, blocks[index : index + 1]).double() / batch
            torch.autograd.backward(loss)
            total += loss.detach()
        add_up([total, *(parameter.grad for parameter in self._trained if parameter.grad is not None)], place)
        penalties = [self._method.penalty(learned_N) for learned_N in self.learned.values()]
        penalty = torch.stack(penalties).sum() / sum(map(len, self.learned.values()))
        torch.autograd.backward(penalty)  # every worker knows all of it: after the sum over workers
        self._optimizer.step()
        return float(total), float(penalty.detach())

    def _attached(self, task: LearnTask, config: ModelDict) -> dict[Site, torch.Tensor]:
        """What the gates are computed from, and gates in the model."""
        family, norms = family_of(config), dict[Site, Norm]()
        widths = family.widths(config)
        if task.method.scales_norms:
            made = {site: family.modules(site).inputs["input"] for site in widths}
            norms = measured_norms(self._model, made, examples_of(task))
        learned: dict[Site, torch.Tensor] = {}
        for site, width in widths.items():
            norm, modules = norms.get(site), family.modules(site)
            start_N = torch.from_numpy(task.method.starts(norm.share_N if norm else np.ones(width)))
            learned[site] = start_N.to(self._model.device, copy=True).requires_grad_()
            if norm is None:
                output = self._model.get_submodule(modules.output)
                output.register_forward_pre_hook(self._scaling(learned[site]))
            else:
                hook = self._rescaling(learned[site], norm.shift_N)
                self._model.get_submodule(modules.inputs["input"]).register_forward_hook(hook)
        return learned

    def _scaling(self, learned_N: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (signal,) = args
            gate_N = self._method.gate(learned_N).to(signal.dtype)
            return (signal * gate_N.repeat_interleave(signal.shape[-1] // len(gate_N)),)  # a unit may have several

        return hook

    def _rescaling(self, learned_N: torch.Tensor, shift_N: Float64) -> Callable[..., torch.Tensor]:
        start_N = self._method.gate(learned_N.detach().clone())

        def hook(_module: torch.nn.Module, _args: object, signal: torch.Tensor) -> torch.Tensor:
            return rescaled(signal, self._method.gate(learned_N) / start_N, shift_N)

        return hook


def examples_of(task: LearnTask) -> Examples:
    """The examples of a classifier.

    Raises:
        ConfigError: it has no labels, or writes text.
    """
    if task.labels_path is None:
        raise ConfigError(f"{task.method.title} learns from labelled images; set data.calibration.label")
    return read_examples(task.tokens_path, task.labels_path)


def add_up(tensors: Iterable[torch.Tensor], place: Place) -> None:
    """Replace tensors by their sums over all workers."""
    if place.world == 1:
        return
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
