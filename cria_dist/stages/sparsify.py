"""Sparsify: single weights of a site's maps become zero, and what that does to their spectra is measured.

A convolution is sparsified as the linear map of patches it is stored as. The spectrum of that matrix bounds the one of
the convolution on a grid, whose error is measured too.

Shapes: O outputs, I inputs of a linear map, N neurons.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from cria_dist.errors import NumericError
from cria_dist.files import write_bytes
from cria_dist.maths.sampling import Sparsification, convolution_error, sparsified, spectral_errors
from cria_dist.methods.weights import WeightMethod
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.records import Scores, Site
from cria_dist.stages.repair import is_repaired
from cria_dist.store.site_scores import has_scores, write_scores

MASKS = "masks"
"""Folder of the masked maps, in the folder of a round or comparison; a plan is applied with them like with a repair."""
TOP = 20
"""Singular values whose change is measured."""


@dataclass(frozen=True, slots=True)
class SparsifyTask:
    """What everyone who sparsifies is told.

    Attributes:
        model_dir: checkpoint the maps are read from.
        method: the method, with its settings.
        share: share of the weights of every map that becomes zero.
        folder: where ``masks/`` and ``scores/`` go.
        digest: digest of weights, method, share and seed.
        seed: seed of the run.
    """

    model_dir: Path
    method: WeightMethod
    share: float
    folder: Path
    digest: str
    seed: int


class Sparsifier:
    """Sparsifies the maps of one site per call."""

    def __init__(self, task: SparsifyTask) -> None:
        self._task = task
        self._config = checkpoint.read_config(task.model_dir)
        self._family = family_of(self._config)

    def __call__(self, site: Site) -> str:
        """Write ``masks/<site>.safetensors`` (the maps with their zeros) and what was measured; returns the key.

        The scores are the share of every neuron's squared weights that is left.

        Raises:
            NumericError: weights are not finite, or all zero.
        """
        task, family, width = self._task, self._family, self._family.widths(self._config)[site]
        taps = family.taps(site, self._config)
        sparse: dict[str, torch.Tensor] = {}
        measured: list[dict[str, float]] = []
        left_N, all_N = np.zeros(width), np.zeros(width)
        with checkpoint.open_tensors(task.model_dir) as tensors:
            for name, unit_axis in map_names(self._config, site).items():
                stored_OI, maps = tensors.read(name), family.maps_in(name, site, self._config)
                try:
                    sparse[name], facts = self._sparsify(name, stored_OI, taps.get(name, 1))
                except NumericError as error:
                    raise NumericError(f"{site.key}, {name}: {error}") from error
                measured.append(facts)
                left_N += maps.sums(_squares(sparse[name], unit_axis), width)
                all_N += maps.sums(_squares(stored_OI, unit_axis), width)
        facts, share_N = _of_site(measured), np.divide(left_N, all_N, out=np.zeros(width), where=all_N > 0)
        cost_N = np.full(width, family.unit_cost(site, self._config), dtype=np.int64)
        write_scores(task.folder, Scores(site, share_N, cost_N, facts=facts), task.digest)
        write_bytes(task.folder / MASKS / f"{site.key}.safetensors", save(sparse, metadata={"digest": task.digest}))
        return site.key

    def _sparsify(self, name: str, stored_OI: torch.Tensor, taps: int) -> tuple[torch.Tensor, dict[str, float]]:
        task, weight_OI = self._task, stored_OI.double().numpy()
        zeros = round(task.share * weight_OI.size)
        seed = zlib.crc32(f"{task.seed}/{name}".encode())
        kept_OI = torch.from_numpy(task.method.sparsify(weight_OI, zeros, seed)).to(stored_OI.dtype)
        by_size_OI = sparsified(weight_OI, zeros, Sparsification(truncate=1.0), seed)
        facts = {"zeros": float((kept_OI == 0).sum()), "weights": float(weight_OI.size)}
        for prefix, found_OI in (("", kept_OI.double().numpy()), ("magnitude_", by_size_OI)):
            distance, singular = spectral_errors(weight_OI, found_OI, TOP)
            facts |= {f"{prefix}spectral_error": distance, f"{prefix}top_{TOP}_error": singular}
            if taps > 1:
                facts[f"{prefix}convolution_error"] = convolution_error(weight_OI, found_OI, math.isqrt(taps))
        return kept_OI, facts


def _squares(weight_OI: torch.Tensor, unit_axis: int) -> torch.Tensor:
    """Sums of the squared weights along the other axis."""
    return weight_OI.double().square().sum(dim=1 - unit_axis)


def _of_site(measured: list[dict[str, float]]) -> dict[str, float]:
    """Sums of counts, and of every error that of the map with the largest."""
    counts = {name: sum(one[name] for one in measured) for name in ("zeros", "weights")}
    names = dict.fromkeys(name for one in measured for name in one if name not in counts)
    errors = {name: max(one[name] for one in measured if name in one) for name in names}
    return {**counts, "sparsity": counts["zeros"] / counts["weights"], **errors}


def map_names(model_config: Mapping[str, object], site: Site) -> dict[str, int]:
    """Names of the weights of a site's maps in checkpoints, with the dimension its neurons lie along; no biases.

    A map between two sites belongs to the one whose units it makes.
    """
    family = family_of(model_config)
    output = family.stored(site).output
    made = {name for one in family.widths(model_config) for name in family.stored(one).inputs.values()}
    shared = f"{output}.weight" if output in made else None
    tensors = family.coupled_tensors(site, model_config)
    return {name: axis for name, axis in tensors.items() if name.endswith(".weight") and name != shared}


def map_sizes(model_config: Mapping[str, object]) -> list[int]:
    """Weights of every map that a weight method puts zeros into."""
    family, model = family_of(model_config), checkpoint.empty_model(model_config)
    sizes = {family.on_disk(name): parameter.numel() for name, parameter in model.named_parameters()}
    return [sizes[name] for site in family.widths(model_config) for name in map_names(model_config, site)]


def is_sparsified(task: SparsifyTask, site: Site) -> bool:
    """Whether the site's maps were sparsified from the same inputs."""
    return is_repaired(task.folder / MASKS, site, task.digest) and has_scores(task.folder, site, task.digest)


def sparse_names(directory: Path) -> frozenset[str]:
    """The tensors of a checkpoint that weight methods put zeros into."""
    config = checkpoint.read_config(directory)
    return frozenset(name for site in family_of(config).widths(config) for name in map_names(config, site))
