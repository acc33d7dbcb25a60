"""Sensitivity: the loss on held-out calibration text with some sites pruned, in the weights in memory.

The output columns of the removed units are zeroed, which computes the same as removing them, and those of the survivors
are repaired from the shards that are not held out; the router goes past removed experts, and a removed layer hands the
hidden state through. The ranking of the units has seen all shards.
Shapes: S sequences, T tokens, D outputs of the next linear map, N units, V vocabulary.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import cast

import numpy as np
import torch

from cria_dist.errors import NumericError
from cria_dist.maths.repair import least_squares, mean_bias
from cria_dist.models import checkpoint, depth, experts
from cria_dist.models.attention import counting
from cria_dist.models.family import family_of
from cria_dist.models.mlp import signals_of
from cria_dist.models.tails import TailModel
from cria_dist.records import Moments, Site
from cria_dist.stages.decide import select
from cria_dist.stages.losses import LossTask, Probe, Trial, write_losses
from cria_dist.store.site_scores import read_scores


class _Meter:
    """A loaded model and the held-out sequences."""

    def __init__(self, task: LossTask) -> None:
        self._task = task
        self._config = checkpoint.read_config(task.model_dir)
        self._family = family_of(self._config)
        self._tail = TailModel(checkpoint.load_model(task.model_dir, task.numerics), self._family)
        tokens_ST = np.load(task.tokens_path, allow_pickle=False)[task.sequences.start : task.sequences.stop]
        self._batches = torch.from_numpy(tokens_ST.astype(np.int64)).split(task.batch_sequences)
        self._restart()

    def _restart(self) -> None:
        self._layer = 0
        self._hidden = [self._tail.embed(batch_ST) for batch_ST in self._batches]

    def _reach(self, layer: int) -> None:
        """Have the hidden states before a layer; sites come in order, so that every layer is run about once."""
        if layer < self._layer:
            self._restart()
        self._hidden = [self._tail.advance(hidden_STD, self._layer, layer) for hidden_STD in self._hidden]
        self._layer = layer

    def _loss(self) -> float:
        """Token mean of the negative log likelihood, from the layer that was reached on."""
        total, count = 0.0, 0
        for hidden_STD, batch_ST in zip(self._hidden, self._batches, strict=True):
            logits_STV = self._tail.logits(hidden_STD, self._layer)[:, :-1]
            for logits_TV, targets_T in zip(logits_STV, batch_ST[:, 1:].to(logits_STV.device), strict=True):
                losses = torch.nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum")
                total += float(losses.double())
            count += batch_ST[:, 1:].numel()
        return total / count

    def _moments(self, site: Site) -> Moments | None:
        if self._task.repair == "none" or site.part == depth.PART:
            return None
        return self._task.recording.moments(site, self._task.shards)

    def _span(self, site: Site) -> int:
        return self._family.span(site, self._config)

    def _pruned(self, site: Site, width: int, moments: Moments | None) -> AbstractContextManager[None]:
        """The model with fewer units at a site, repaired, or without a layer, until the block ends."""
        if site.part == depth.PART:
            return nullcontext() if width else self._tail.without(site.layer)
        if not width:
            return nullcontext()
        if site.part == experts.PART:
            router = self._tail.model.get_submodule(self._family.modules(site).inputs["router"])
            return experts.routed_among(router, select(read_scores(self._task.folder, site), width))
        return self._narrower(site, width, moments)

    @contextmanager
    def _narrower(self, site: Site, width: int, moments: Moments | None) -> Generator[None]:
        modules, scores = self._family.modules(site), read_scores(self._task.folder, site)
        output = cast(torch.nn.Linear, self._tail.model.get_submodule(modules.output))
        dense = {name: getattr(output, name) for name in ("weight", "bias")}
        kept = select(scores, width)
        kept_S = signals_of(kept, self._span(site))
        weight_DN = self._family.oriented(dense["weight"].detach()).double().cpu().numpy()
        pruned_DN, shift_D = np.zeros_like(weight_DN), None
        pruned_DN[:, kept_S] = weight_DN[:, kept_S]
        if moments is not None and self._task.repair == "bias":
            shift_D = mean_bias(weight_DN, moments, kept_S)
        elif moments is not None:
            pruned_DN[:, kept_S] = least_squares(weight_DN, moments, kept_S, self._task.ridge)
        try:
            output.weight = _parameter(self._family.oriented(pruned_DN), dense["weight"])
            if shift_D is not None:
                bias = dense["bias"]
                output.bias = _parameter(
                    shift_D if bias is None else shift_D + bias.detach().double().cpu().numpy(), output.weight
                )
            with ExitStack() as norms:
                for name in modules.norms:
                    norms.enter_context(counting(self._tail.model.get_submodule(name), kept, scores.keep_N.size))
                yield
        finally:
            output.weight, output.bias = dense["weight"], dense["bias"]

    def _finished(self, item: Probe | Trial, losses: Sequence[float]) -> tuple[float, ...]:
        """Write what was measured.

        Raises:
            NumericError: a loss is not finite.
        """
        if not all(math.isfinite(loss) for loss in losses):
            raise NumericError(f"{item} is {list(losses)}; was the model damaged by pruning in this dtype?")
        write_losses(self._task, item, losses)
        return tuple(losses)


class CurveMeter(_Meter):
    """Measures one site per call; what lies before it is not computed again for each width."""

    def __call__(self, probe: Probe) -> tuple[float, ...]:
        """The loss with the site pruned to each width, all others whole."""
        self._reach(probe.site.layer)
        moments, losses = self._moments(probe.site), list[float]()
        for width in probe.widths:
            with self._pruned(probe.site, width, moments):
                losses.append(self._loss())
        return self._finished(probe, losses)


class PlanMeter(_Meter):
    """Measures one allocation per call."""

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        """The loss with all sites pruned."""
        self._reach(0)
        with ExitStack() as stack:
            for key, width in trial.widths:
                site = Site.from_key(key)
                stack.enter_context(self._pruned(site, width, self._moments(site)))
            return self._finished(trial, [self._loss()])


def _parameter(values: np.ndarray, like: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(values).to(like.device, like.dtype), requires_grad=False)
