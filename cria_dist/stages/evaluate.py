"""Evaluate: perplexity or accuracy, and size, of the variants of a model.

Shapes: S sequences or examples, T tokens, V vocabulary, C classes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from cria_dist import files
from cria_dist.errors import NumericError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, pruned_copy
from cria_dist.records import Evaluation, PruningPlan
from cria_dist.stages.examples import Examples, read_examples, unpadded


@dataclass(frozen=True, slots=True)
class Variant:
    """A model to evaluate: a checkpoint, or the dense checkpoint pruned by a plan in memory.

    Attributes:
        label: name in the tables.
        model_dir: checkpoint to load.
        method: title of the pruning method, empty for the dense model.
        repair: kind of repair that was applied.
        plan_path: plan to apply after loading, or None when the checkpoint is the variant.
        repair_dir: replacement tensors to apply with the plan.
    """

    label: str
    model_dir: Path
    method: str = ""
    repair: str = "none"
    plan_path: Path | None = None
    repair_dir: Path | None = None

    def __str__(self) -> str:
        """Name of the work item."""
        return f"evaluate {self.label}"

    def load(self, numerics: checkpoint.Numerics, devices: Mapping[str, int | str] | None = None) -> PreTrainedModel:
        """The variant, ready for inference, on devices as :func:`checkpoint.load_model` takes them."""
        model = checkpoint.load_model(self.model_dir, numerics, devices)
        if self.plan_path is None:
            return model
        plan = PruningPlan.from_json(self.plan_path.read_text(encoding="utf-8"))
        config = checkpoint.read_config(self.model_dir)
        surgery = Surgery(family_of(config), config, plan.kept, self.repair_dir, self.repair == "bias")
        return pruned_copy(model, surgery)


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model does.

    Attributes:
        loss: mean negative log likelihood per token or label.
        count: tokens or labels it is over.
        accuracy: share of the labels that were found.
    """

    loss: float
    count: int
    accuracy: float | None = None


class Meter(ABC):
    """Scores one variant per call.

    Args:
        numerics: how the models compute.
        batch_sequences: sequences or examples per forward pass.
        results: where the result of each variant goes.
    """

    def __init__(self, numerics: checkpoint.Numerics, batch_sequences: int, results: Mapping[Variant, Path]) -> None:
        self._numerics = numerics
        self._batch = batch_sequences
        self._results = results

    @abstractmethod
    def _measure(self, model: PreTrainedModel) -> Quality:
        """How well a model does on the test data."""

    def __call__(self, variant: Variant) -> Evaluation:
        """Quality and size of a variant; also written to its file, so that a finished measurement is never lost.

        Raises:
            NumericError: the loss is not finite.
        """
        model = variant.load(self._numerics)
        quality = self._measure(model)
        if not math.isfinite(quality.loss):
            raise NumericError(
                f"the loss of {variant.label} is {quality.loss}; was the model damaged by pruning in this dtype?"
            )
        evaluation = Evaluation(
            label=variant.label,
            method=variant.method,
            repair=variant.repair,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            perplexity=math.exp(min(quality.loss, 700.0)),
            scored_tokens=quality.count,
            weight_bytes=weight_bytes(variant, model),
            accuracy=quality.accuracy,
        )
        files.write_json(self._results[variant], asdict(evaluation))
        return evaluation


class PerplexityMeter(Meter):
    """Scores language models on test tokens, int32 [S, T] (see :class:`Meter` for the rest)."""

    def __init__(
        self, tokens_path: Path, numerics: checkpoint.Numerics, batch_sequences: int, results: Mapping[Variant, Path]
    ) -> None:
        super().__init__(numerics, batch_sequences, results)
        self._tokens_ST = np.load(tokens_path, allow_pickle=False)

    def _measure(self, model: PreTrainedModel) -> Quality:
        loss = mean_loss(model, self._tokens_ST, self._batch)
        return Quality(loss, self._tokens_ST.shape[0] * (self._tokens_ST.shape[1] - 1))


class AccuracyMeter(Meter):
    """Scores classifiers on test examples and their labels (see :class:`Meter` for the rest)."""

    def __init__(
        self,
        paths: tuple[Path, Path],
        numerics: checkpoint.Numerics,
        batch_sequences: int,
        results: Mapping[Variant, Path],
    ) -> None:
        super().__init__(numerics, batch_sequences, results)
        self._examples = read_examples(*paths)

    def _measure(self, model: PreTrainedModel) -> Quality:
        return label_quality(model, self._examples, self._batch)


def label_quality(model: PreTrainedModel, examples: Examples, batch: int) -> Quality:
    """Mean cross entropy of the labels, and the share the largest logit finds; no sentence is padded for it."""
    total, found = 0.0, 0
    with torch.inference_mode():
        for part in unpadded(examples, batch):
            inputs, labels_S = part.tensors(model.device)
            logits_SC = model(**inputs).logits.float()
            total += float(torch.nn.functional.cross_entropy(logits_SC, labels_S, reduction="sum").double())
            found += int((logits_SC.argmax(dim=-1) == labels_S).sum())
    return Quality(total / len(examples), len(examples), found / len(examples))


def mean_loss(model: PreTrainedModel, tokens_ST: np.ndarray, batch: int) -> float:
    """Token mean of the negative log likelihood; each sequence starts without context."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(tokens_ST), batch):
            tokens = torch.from_numpy(tokens_ST[start : start + batch]).to(model.device, torch.int64)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            targets = tokens[:, 1:]
            for logits_TV, targets_T in zip(logits, targets, strict=True):  # one sequence of float32 logits at a time
                losses = torch.nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum")
                total += float(losses.double())
            count += targets.numel()
    return total / count


def weight_bytes(variant: Variant, model: PreTrainedModel) -> int:
    """Size of the weight files of a checkpoint; of a variant that exists only in memory, of its tensors as stored."""
    stored = sum((variant.model_dir / file).stat().st_size for file in checkpoint.weight_files(variant.model_dir))
    if variant.plan_path is None:
        return stored
    dense = checkpoint.count_parameters(checkpoint.read_config(variant.model_dir))
    return round(stored * sum(parameter.numel() for parameter in model.parameters()) / dense)
