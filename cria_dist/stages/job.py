"""The facts of a checked run that all stages share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.config import Repair, RunConfig
from cria_dist.models import checkpoint
from cria_dist.models.mlp import PART, MlpFamily
from cria_dist.records import Site
from cria_dist.stages.budget import budget_of, final_widths


@dataclass(frozen=True, slots=True)
class Job:
    """A checked run: what is pruned, on what, into which folder.

    Attributes:
        config: the configuration.
        folder: the run folder.
        model_dir: dense checkpoint.
        model_config: its config.json.
        family: its adapter.
        widths: units per site.
        dense_parameters: parameters of the dense model, tied weights once.
        digests: of the model, of the calibration and test tokens or examples, and of their labels.
    """

    config: RunConfig
    folder: Path
    model_dir: Path
    model_config: Mapping[str, Any]
    family: MlpFamily
    widths: Mapping[Site, int]
    dense_parameters: int
    digests: Mapping[str, str]

    @property
    def numerics(self) -> checkpoint.Numerics:
        """How models compute in this run."""
        return checkpoint.Numerics(self.config.model.dtype, self.config.model.matmul)

    @property
    def calibration_path(self) -> Path:
        """Calibration tokens, int32 [sequences, length], or images, float32 [images, channels, height, width].

        Sentences are rows of tokens too, padded behind their end (``stages/examples.py``).
        """
        return self._input("calibration")

    @property
    def calibration_labels_path(self) -> Path | None:
        """Labels of a classifier's calibration examples, int64 [examples]."""
        return self._input("calibration-labels") if self._is_labelled else None

    @property
    def calibration_digest(self) -> str:
        """Digest of the calibration tokens or examples, without their labels."""
        return self.digests[f"calibration_{self.family.takes}"]

    def recording_digest(self, model_digest: str) -> str:
        """Digest of everything that a model's recording depends on."""
        return files.digest(
            "record",
            model_digest,
            self.calibration_digest,
            self.config.record.content_part(),
            [self.numerics.dtype, self.numerics.matmul, self.config.seed],
            *(["hidden"] if self.config.records_hidden else []),
            *self.other_parts,
        )

    @property
    def training_digests(self) -> list[str]:
        """Digests of what is trained on: the calibration tokens, or examples and labels."""
        return [self.calibration_digest, *self.label_digests]

    @property
    def label_digests(self) -> list[str]:
        """Digest of the labels of a classifier's calibration examples, which a recording does not depend on."""
        return [self.digests["calibration_labels"]] if self._is_labelled else []

    @property
    def test_path(self) -> Path:
        """Test tokens or examples, as those of the calibration."""
        return self._input("test")

    @property
    def test_labels_path(self) -> Path | None:
        """Labels of a classifier's test examples."""
        return self._input("test-labels") if self._is_labelled else None

    @property
    def test_digests(self) -> list[str]:
        """Digests of what is measured on."""
        labels = [self.digests["test_labels"]] if self._is_labelled else []
        return [self.digests[f"test_{self.family.takes}"], *labels]

    @property
    def _is_labelled(self) -> bool:
        return self.family.takes != "tokens" and self.config.data.labelled

    def _input(self, name: str) -> Path:
        return self.folder / self.family.takes / f"{name}.npy"

    @property
    def repair(self) -> Repair:
        """What the survivors of ``method`` are repaired by: nothing where whole layers leave, or single weights."""
        return self.config.prune.repair if self.config.method.unit == "mlp" else "none"

    def added_parameters(self, kept: Mapping[str, tuple[int, ...]]) -> int:
        """Parameters left beyond what the units' costs say: biases of the repair, and what two sites share."""
        shared = self.family.removed_twice(self.model_config, kept)
        if self.config.prune.repair != "bias":
            return shared
        left = [len(units) for key, units in kept.items() if units and Site.from_key(key).part == PART]
        return shared + sum(self.family.output_bias_cost(self.model_config, width) for width in left)

    @property
    def unit_parameters(self) -> dict[str, int]:
        """Parameters that leave with one unit of each site."""
        prune = self.config.prune.model_copy(update={"budget": "parameters"})
        measured = self.config.model_copy(update={"prune": prune})
        costs = budget_of(measured, self.family, self.model_config, self.dense_parameters).unit_cost
        return {site.key: int(cost) for site, cost in costs.items()}

    @property
    def other_parts(self) -> list[object]:
        """The parts that are scored where they are not the MLPs alone: as digests of runs know them."""
        parts = self.config.prune.parts
        return [] if parts == ("mlp",) else [list(parts)]

    @property
    def final_widths(self) -> dict[str, int]:
        """Units per site key after the last round of an even allocation."""
        return final_widths(self.config, self.family, self.model_config, self.dense_parameters)
