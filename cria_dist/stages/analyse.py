"""Analyse: one site at a time, from recorded statistics to scores and spectrum."""

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths import density
from cria_dist.methods import Method, SiteStatistics
from cria_dist.methods.base import Statistic
from cria_dist.models import checkpoint, experts
from cria_dist.models.family import family_of
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.records import Float64, Scores, Site
from cria_dist.store.gates import Gates
from cria_dist.store.recording import Recording
from cria_dist.store.saliences import Saliences
from cria_dist.store.site_scores import write_scores

MOST_PER_DEVICE = 4
"""Analysts on one GPU; beyond a few they only wait for each other's kernels."""


@dataclass(frozen=True, slots=True)
class AnalyseTask:
    """What every analyst of a round is told.

    Attributes:
        recording: recorded statistics.
        model_dir: checkpoint the recording was made of.
        method: the method, with its settings.
        folder: where ``scores/`` and ``spectra/`` go.
        digest: digest of recording, weights and method.
        seed: seed of the run.
        sharing: analysts on one GPU.
        saliences: what was taken of the gradients, for a method that needs them.
        gates: what was learned, for a method that learns.
    """

    recording: Recording
    model_dir: Path
    method: Method
    folder: Path
    digest: str
    seed: int
    sharing: int = 1
    saliences: Saliences | None = None
    gates: Gates | None = None


def analyst_bytes(needs: Collection[Statistic], tokens: int, width: int, hidden: int) -> int:
    """Memory of one analyst or repairer, by the statistics it reads.

    Signals: three, their working copies, and dense matrices where the spectrum is exact. Moments: the Gram matrix in
    float64, and what its inversion holds beside it (5.2 matrices in all, as measured). Weights: the maps of a unit in
    float64, of which those that go in are gone when the moments come.

    Args:
        needs: the statistics.
        tokens: sampled tokens.
        width: signals of the site: units, or their spans together.
        hidden: outputs of the next linear map.
    """
    dense = 4 * 8 * width * width if width <= density.EXACT_LIMIT else 0
    signals = 6 * 4 * tokens * width + dense if "signals" in needs else 0
    moments = 6 * 8 * width * width + 2 * 8 * hidden * width if "moments" in needs else 0
    weights = 5 * 8 * hidden * width if "weights" in needs else 0
    return signals + max(moments, weights)


def analysts_per_device(size: int, available: int) -> int:
    """How many analysts of this size (bytes) one GPU holds at the same time."""
    return max(1, min(MOST_PER_DEVICE, available // max(size, 1)))


def analysts_at_a_time(size: int, available: int, workers: int) -> int:
    """How many workers without GPUs may be analysts of this size, where each was to have ``available`` bytes."""
    return max(1, min(workers, workers * available // max(size, 1)))


def widest_site(family: MlpFamily, config: ModelDict, parts: Collection[str]) -> int:
    """Most signals of a site."""
    return max((width * family.span(site, config) for site, width in family.widths(config, parts).items()), default=0)


class Analyst:
    """Scores one site per call."""

    def __init__(self, task: AnalyseTask) -> None:
        self._task = task
        self._library: arrays.Library = arrays.choose()[0]
        arrays.limit_memory(1 / task.sharing)
        self._config = checkpoint.read_config(task.model_dir)
        self._family = family_of(self._config)

    def __call__(self, site: Site) -> str:
        """Score a site and write the result; returns the site's key.

        Raises:
            NumericError: degenerate statistics, with the site's name.
            DataError: a recorded file is missing or damaged.
        """
        task = self._task
        width = self._family.widths(self._config, (site.part,))[site]
        try:
            verdict = task.method.score(self._statistics(site, width))
        except NumericError as error:
            raise NumericError(f"{site.key}: {error}") from error
        if verdict.keep_N.shape != (width,) or np.isnan(verdict.keep_N).any():
            raise NumericError(f"{site.key}: {task.method.title} gave scores of shape {verdict.keep_N.shape} or NaN")
        cost_N = np.full(width, self._family.unit_cost(site, self._config), dtype=np.int64)
        scores = Scores(
            site, verdict.keep_N.astype(np.float64), cost_N, verdict.edges_E2, verdict.spectrum, verdict.facts
        )
        write_scores(task.folder, scores, task.digest)
        return site.key

    def _statistics(self, site: Site, width: int) -> SiteStatistics:
        needs = self._task.method.needs
        signals = self._task.recording.signals(site) if "signals" in needs else {}
        output_NM = signals.pop("output", None)
        input_NM = np.concatenate(list(signals.values()), axis=1) if signals else None
        weights = (None, None, None)
        if "weights" in needs:
            weights = self._expert_weights(site, width) if site.part == experts.PART else self._weights(site, width)
        weight_norm_N, output_norm_N, output_DN = weights
        return SiteStatistics(
            width=width,
            input_NM=None if input_NM is None else arrays.to_device(input_NM, self._library),
            output_NM=None if output_NM is None else arrays.to_device(output_NM, self._library),
            moments=self._task.recording.moments(site) if "moments" in needs else None,
            weight_norm_N=weight_norm_N,
            output_norm_N=output_norm_N,
            output_DN=None if output_DN is None else arrays.to_device(output_DN, self._library),
            taylor_N=None if self._task.saliences is None else self._task.saliences.mean(site),
            gate_N=None if self._task.gates is None else self._task.gates.read(site),
            seed=zlib.crc32(f"{self._task.seed}/{site.key}".encode()),
            span=self._family.span(site, self._config),
            routed=site.part == experts.PART,
        )

    def _expert_weights(self, site: Site, width: int) -> tuple[Float64, None, None]:
        """Coupled norm of every expert: what goes in, together, times what goes out."""
        output = self._family.modules(site).output
        with checkpoint.open_tensors(self._task.model_dir) as tensors:
            inputs_E, outputs_E = (
                [
                    sum(float(tensors.read(one).double().square().sum()) for one in names)
                    for names in self._family.pieces(f"{output}.{leaf}", (width,))
                ]
                for leaf in experts.MAPS
            )
        return np.sqrt(np.multiply(inputs_E, outputs_E)), None, None

    def _weights(self, site: Site, width: int) -> tuple[Float64, Float64, Float64]:
        """Coupled norm of every unit (incoming rows together, times columns), norms of the columns, their map."""
        modules, stack = self._family.stored(site), self._family.stack(site, self._config)
        with checkpoint.open_tensors(self._task.model_dir) as tensors:
            names = [f"{name}.weight" for name in (*modules.inputs.values(), modules.output)]
            *maps, output_DN = (self._family.oriented(tensors.read(name)).double() for name in names)
            squared_N = sum(stack.sums(one.square().sum(dim=1), width) for one in maps)
        output_norm_N = output_DN.norm(dim=0).numpy()
        columns_N = output_norm_N
        if output_norm_N.size > width:
            columns_N = np.linalg.norm(output_norm_N.reshape(width, -1), axis=1)
        return np.sqrt(squared_N) * columns_N, output_norm_N, output_DN.numpy()
