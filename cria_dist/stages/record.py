"""Record: run calibration shards through the model, keep sampled signals and running moments of every site.

Shapes: S sequences, T tokens, N neurons.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cria_dist.errors import NumericError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.records import Site
from cria_dist.store import activations, moments
from cria_dist.store.recording import Recording


@dataclass(frozen=True, slots=True)
class RecordTask:
    """What every recorder of a round is told.

    Attributes:
        recording: where to write.
        model_dir: checkpoint to observe.
        tokens_path: calibration tokens.
        numerics: how the model computes.
        signal_dtype: data type to store signals in.
        shard_sequences: sequences per shard.
        batch_sequences: sequences per forward pass.
        sampled_tokens: tokens per site to store, over all shards.
        seed: seed of the token sample.
    """

    recording: Recording
    model_dir: Path
    tokens_path: Path
    numerics: checkpoint.Numerics
    signal_dtype: str
    shard_sequences: int
    batch_sequences: int
    sampled_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class ShardDone:
    """What a recorder reports of one shard."""

    shard: int
    tokens: int
    bytes_written: int


class Recorder:
    """Holds the model; called once per shard."""

    def __init__(self, task: RecordTask) -> None:
        self._task = task
        self._tokens_ST = np.load(task.tokens_path, mmap_mode="r", allow_pickle=False)
        self._model = checkpoint.load_model(task.model_dir, task.numerics)
        self._device = self._model.device
        config = checkpoint.read_config(task.model_dir)
        family = family_of(config)
        self._observers = {
            site: SiteObserver(width, task.signal_dtype, self._device) for site, width in family.widths(config).items()
        }
        for site, observer in self._observers.items():
            modules = family.modules(site)
            for name, module in modules.inputs.items():
                self._model.get_submodule(module).register_forward_hook(observer.input_hook(name))
            self._model.get_submodule(modules.output).register_forward_pre_hook(observer.output_hook)

    def __call__(self, shard: int) -> ShardDone:
        """Record one shard and commit it.

        Raises:
            NumericError: a signal is not finite, or does not fit the storage data type.
        """
        task = self._task
        first = shard * task.shard_sequences
        last = min(first + task.shard_sequences, len(self._tokens_ST))
        for observer in self._observers.values():
            observer.reset()
        sequences: list[int] = []
        positions: list[int] = []
        for start in range(first, last, task.batch_sequences):
            batch_ST = torch.from_numpy(np.array(self._tokens_ST[start : min(start + task.batch_sequences, last)]))
            rows = self._sample(start, batch_ST.shape, sequences, positions)
            self._forward(batch_ST, rows)
        written = self._write(shard, {"sequence": sequences, "position": positions})
        return ShardDone(shard, (last - first) * self._tokens_ST.shape[1], written)

    def _sample(self, start: int, shape: torch.Size, sequences: list[int], positions: list[int]) -> torch.Tensor:
        """Flat indices of the sampled tokens of a batch; appends their origin to the two lists."""
        size, length = shape
        rows: list[np.ndarray] = []
        for offset in range(size):
            chosen = sampled_positions(
                self._task.seed, start + offset, len(self._tokens_ST), self._task.sampled_tokens, length
            )
            rows.append(offset * length + chosen)
            sequences += [start + offset] * len(chosen)
            positions += chosen.tolist()
        return torch.from_numpy(np.concatenate(rows)).to(self._device)

    def _forward(self, batch_ST: torch.Tensor, rows: torch.Tensor) -> None:
        for observer in self._observers.values():
            observer.rows = rows
        with torch.inference_mode():
            decoder(self._model)(input_ids=batch_ST.to(self._device, torch.int64), use_cache=False)

    def _write(self, shard: int, origin: Mapping[str, list[int]]) -> int:
        task, recording = self._task, self._task.recording
        tokens = {name: np.asarray(values, dtype=np.int32) for name, values in origin.items()}
        sites: dict[str, Any] = {}
        for site, observer in self._observers.items():
            observer.check(site, shard)
            signals = {name: observer.stored(name) for name in observer.signals}
            path = recording.signal_path(site, shard)
            facts = activations.write_shard(path, signals, tokens, task.signal_dtype, site.key)
            total_N, gram_NN = observer.total_N.cpu().numpy(), observer.gram_NN.cpu().numpy()
            moment_facts = moments.write_moments(recording.moments_path(site, shard), observer.count, total_N, gram_NN)
            sites[site.key] = {"signals": {**facts, "width": observer.width}, "moments": moment_facts}
        recording.commit(shard, sites, task.signal_dtype)
        return sum(facts["signals"]["bytes"] + facts["moments"]["bytes"] for facts in sites.values())


class SiteObserver:
    """Collects the signals of one site over one shard."""

    def __init__(self, width: int, dtype: str, device: torch.device) -> None:
        self.width = width
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self.signals: dict[str, list[torch.Tensor]] = {}
        self.count = 0
        self.total_N = torch.zeros(width, dtype=torch.float32, device=device)
        self.gram_NN = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._dtype = getattr(torch, dtype)

    def reset(self) -> None:
        """Forget the last shard."""
        self.signals = {}
        self.count = 0
        self.total_N.zero_()
        self.gram_NN.zero_()

    def input_hook(self, name: str) -> Callable[..., None]:
        """Hook for a linear map whose output is a pre-activation signal."""

        def hook(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> None:
            self._keep(name, output.reshape(-1, self.width))

        return hook

    def output_hook(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook for the linear map that reads the post-activation signal."""
        signal_TN = args[0].reshape(-1, self.width)
        self._keep("output", signal_TN)
        signal_TN = signal_TN.float()
        self.count += len(signal_TN)
        self.total_N += signal_TN.sum(dim=0)
        self.gram_NN.addmm_(signal_TN.T, signal_TN)

    def stored(self, name: str) -> np.ndarray:
        """A signal in the words of the storage data type, [T, N]."""
        signal_TN = torch.cat(self.signals[name])
        return (signal_TN.view(torch.uint16) if self._dtype is torch.bfloat16 else signal_TN).cpu().numpy()

    def check(self, site: Site, shard: int) -> None:
        """Refuse NaN and infinity, in the moments (all tokens) and in what is stored (overflow).

        Raises:
            NumericError: names site, shard and how many values.
        """
        broken = int((~torch.isfinite(self.total_N)).sum()) + int((~torch.isfinite(self.gram_NN.diagonal())).sum())
        if broken:
            raise NumericError(
                f"{site.key}, shard {shard}: {broken} moments are NaN or infinite; does the model overflow in this "
                "model.dtype?"
            )
        for name, blocks in self.signals.items():
            overflown = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
            if overflown:
                raise NumericError(
                    f"{site.key}, shard {shard}: {overflown} values of signal {name!r} do not fit {self._dtype}; "
                    "set record.dtype=bfloat16 or float32"
                )

    def _keep(self, name: str, signal_TN: torch.Tensor) -> None:
        self.signals.setdefault(name, []).append(signal_TN[self.rows].to(self._dtype))


def sampled_positions(seed: int, sequence: int, num_sequences: int, tokens: int, length: int) -> np.ndarray:
    """Positions sampled from one sequence: stratified over sequences, the same for all sites and any worker.

    The first position is never taken: it acts as an attention sink with activations of another scale.

    Args:
        seed: seed of the run.
        sequence: index of the sequence.
        num_sequences: number of calibration sequences.
        tokens: tokens sampled over all sequences.
        length: tokens per sequence.

    Returns:
        Sorted positions; ``tokens // num_sequences`` of them, one more for the first ``tokens % num_sequences``.
    """
    quota = tokens // num_sequences + (1 if sequence < tokens % num_sequences else 0)
    generator = np.random.default_rng((seed, sequence))
    return np.sort(1 + generator.choice(length - 1, size=quota, replace=False))


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head: logits are not needed to observe neurons."""
    return getattr(model, model.base_model_prefix, model)
