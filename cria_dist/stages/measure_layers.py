"""Measure layers: one shard of recorded hidden states at a time, from all layers at once.

Every file is read once, and the sums of the shards are added up. Shapes: T tokens, D hidden, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.methods.layers import LayerMethod
from cria_dist.models import checkpoint, depth
from cria_dist.records import Float64, Scores, Site
from cria_dist.store.activations import StoredSignals, to_float32
from cria_dist.store.layer_sums import shard_name, write_sums
from cria_dist.store.recording import Recording
from cria_dist.store.site_scores import write_scores


@dataclass(frozen=True, slots=True)
class MeasureTask:
    """What everyone who measures layers in a round is told.

    Attributes:
        recording: recorded hidden states.
        model_dir: checkpoint the recording was made of.
        method: the method, with its settings.
        folder: where ``layers/`` and ``scores/`` go.
        digest: digest of recording, weights and method.
        sequences: calibration sequences to look at, from the first one on.
    """

    recording: Recording
    model_dir: Path
    method: LayerMethod
    folder: Path
    digest: str
    sequences: int


class LayerMeter:
    """Measures all layers on one shard per call."""

    def __init__(self, task: MeasureTask) -> None:
        self._task = task
        self._library: arrays.Library = arrays.choose()[0]
        self._sites = depth.layer_sites(checkpoint.read_config(task.model_dir))

    def __call__(self, shard: int) -> int:
        """Write the sums of a shard; returns the sampled tokens they are over.

        Raises:
            NumericError: the hidden states do not define the method's statistics, with the shard's number.
            DataError: a recorded file is missing or damaged.
        """
        task = self._task
        states, sequence_T = self._states(shard)
        seen = [index for index in np.unique(sequence_T).tolist() if index < task.sequences]
        total: Float64 | None = None
        tokens = 0
        for index in seen:
            rows = np.flatnonzero(sequence_T == index)
            one = [arrays.to_device(state_TD[rows], self._library) for state_TD in states]
            try:
                measured = task.method.measure(one)
            except NumericError as error:
                raise NumericError(f"shard {shard}, sequence {index}: {error}") from error
            total = measured if total is None else total + measured
            tokens += len(rows)
        write_sums(task.folder, shard_name(shard), np.zeros(0) if total is None else total, task.digest)
        return tokens

    def _states(self, shard: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The states entering the first layer and leaving each layer, L + 1 of [T, D]; each token's sequence [T]."""
        dtype = self._task.recording.shape(self._sites[0])[2]
        stored = [self._task.recording.hidden(site, shard) for site in self._sites]
        states = [_joined(stored[0], "input", dtype), *(_joined(one, "output", dtype) for one in stored)]
        return states, stored[0].tokens["sequence"]


def _joined(stored: StoredSignals, signal: str, dtype: str) -> np.ndarray:
    tiles = stored.tiles[signal]
    state_TD = np.empty((stored.rows, sum(words_TN.shape[1] for _, words_TN in tiles)), dtype=np.float32)
    for start, words_TN in tiles:
        to_float32(words_TN, dtype, state_TD[:, start : start + words_TN.shape[1]])
    return state_TD


def added_up(parts: Sequence[Float64]) -> Float64:
    """The sums over all shards, in their order; a shard with held-out sequences only has none."""
    return np.sum([part for part in parts if part.size], axis=0)


def write_layer_scores(task: MeasureTask, total: Float64, parameters: Sequence[int]) -> None:
    """Judge the layers and write the scores of each: its one unit is the layer itself.

    Args:
        task: what was measured.
        total: the sums over all shards.
        parameters: of every layer.

    Raises:
        NumericError: the sums do not define scores.
    """
    verdict = task.method.judge(total)
    if verdict.keep_N.shape != (len(parameters),) or np.isnan(verdict.keep_N).any():
        raise NumericError(f"{task.method.title} gave scores of shape {verdict.keep_N.shape} or NaN for the layers")
    for layer, cost in enumerate(parameters):
        keep_N, cost_N = verdict.keep_N[layer : layer + 1], np.array([cost], dtype=np.int64)
        facts = {"score": float(keep_N[0])}
        write_scores(task.folder, Scores(Site(layer, depth.PART), keep_N, cost_N, facts=facts), task.digest)
