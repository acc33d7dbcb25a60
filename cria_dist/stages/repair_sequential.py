"""Sequential repair: layer by layer, with what the layers before it have left of its inputs after their own repair.

The calibration shards go through the model twice at the same time, as it is and as it will be. A work item observes one
shard at one site, solves a site from all shards, or takes a shard past a layer that is solved.
Shapes: S kept signals of a site (and a column of ones where its output map has a bias), T tokens, D outputs of the map.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from cria_dist import arrays
from cria_dist.errors import ConfigError, DataError, NumericError
from cria_dist.files import write_bytes
from cria_dist.maths.repair import Products, least_squares, refit
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block
from cria_dist.models.family import family_of
from cria_dist.models.mlp import signals_of
from cria_dist.models.twin import TwinLayer
from cria_dist.records import Site
from cria_dist.stages import boundary, memory
from cria_dist.stages.gram import add_products, gram_of
from cria_dist.stages.repair import is_repaired
from cria_dist.stages.repair_steps import Advance, Observe, SequentialTask, Solve, Step, solver_bytes
from cria_dist.stages.sample import Batch, sample_of
from cria_dist.store import sealed
from cria_dist.store.names import Slice

log = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds. Clients of NFS keep the absence of a file for 30 to 60."""


class SequentialRepairer:
    """Holds one layer at a time, as it is and as it will be; called once per work item."""

    def __init__(self, task: SequentialTask) -> None:
        record = task.record
        self._task = task
        self._config = checkpoint.read_config(record.model_dir)
        self._family = family_of(self._config)
        self._inputs = np.load(record.tokens_path, mmap_mode="r", allow_pickle=False)
        self._sample = sample_of(self._family, self._config, self._inputs, record.sampled_tokens, record.seed)
        self._batch = record.batch_sequences
        self._twin: TwinLayer | None = None

    def __call__(self, step: Step) -> int:
        """Do one step and store what comes out; returns the calibration tokens that went through a layer.

        When a GPU runs out of memory, the step is done again with batches of half the size, as are those after it.

        Raises:
            ConfigError: the GPU has too little memory for a single sequence.
            NumericError: a signal or hidden state is not finite.
            DataError: the checkpoint, or what an earlier step stored, cannot be read.
        """
        while True:
            try:
                return self._do(step)
            except torch.OutOfMemoryError as error:
                if self._batch == 1 or isinstance(step, Solve):
                    raise ConfigError(f"{step}: out of GPU memory; set prune.repair=least_squares") from error
            log.warning("%s: out of GPU memory, batches of %d -> %d", step, self._batch, self._batch // 2)
            self._batch //= 2
            torch.cuda.empty_cache()

    def _do(self, step: Step) -> int:
        if isinstance(step, Solve):
            try:
                self._solve(step.site)
            except NumericError as error:
                raise NumericError(f"{step.site.key}: {error}") from error
            return 0
        first = step.shard * self._task.record.shard_sequences
        sequences = range(first, min(first + self._task.record.shard_sequences, self._sample.sequences))
        with torch.inference_mode():
            if isinstance(step, Observe):
                self._observe(step, sequences)
            else:
                self._advance(step, sequences)
        return self._sample.count(sequences)

    def _observe(self, step: Observe, sequences: range) -> None:
        """The output's target is where the whole model's sum ends up, less what the new output will be added to."""
        layer, twin = step.site.layer, self._at(step.site.layer, before=step.site)
        outputs, biased = twin.sizes(step.site)
        width = len(self._task.kept[step.site.key]) * self._family.span(step.site, self._config)
        gram = gram_of(Slice(0, width + biased), width + biased, twin.device)
        cross_SD = torch.zeros(width + biased, outputs, device=twin.device)
        behind = boundary.Behind(len(sequences))
        for part, whole, left in self._batches(layer, step.shard, sequences):
            hidden, goal = twin.run(whole, site=step.site)
            behind.put(part, hidden)
            seen = twin.run(left, pruned=True, site=step.site)[1]
            signal_TS = twin.kept_signals(step.site, seen)
            if biased:
                signal_TS = torch.nn.functional.pad(signal_TS, (0, 1), value=1.0)
            gram.add(signal_TS)
            add_products(cross_SD, signal_TS, goal.joined_TD - seen.beside_TD)
        sums = {"gram": torch.from_numpy(gram.rows()), "cross": cross_SD.cpu()}
        sealed.write(self._task.sums, step.name, sums)
        whole_stream = self._task.streams[0]
        if layer < self._task.sites[-1].layer and not boundary.is_stored(whole_stream, layer + 1, step.shard):
            behind.write(whole_stream, layer + 1, step.shard)  # one pass less for the step behind the layer

    def _advance(self, step: Advance, sequences: range) -> None:
        """Hidden states behind the layer, for the next one."""
        twin, behind = self._at(step.layer), step.layer + 1
        found = {
            (number, stream): boundary.Behind(len(sequences))
            for number, stream in enumerate(self._task.streams)
            if not boundary.is_stored(stream, behind, step.shard)
        }
        for part, *values in self._batches(step.layer, step.shard, sequences):
            for (number, _), hidden in found.items():
                hidden.put(part, twin.run(values[number], pruned=bool(number))[0])
        for (_, stream), hidden in found.items():
            hidden.write(stream, behind, step.shard)

    def _solve(self, site: Site) -> None:
        """The weights of the kept units, and the bias where the map has one."""
        task, name = self._task, self._family.stored(site).output
        kept_S = signals_of(task.kept[site.key], self._family.span(site, self._config))
        with checkpoint.open_tensors(task.record.model_dir) as tensors:
            weight = self._family.oriented(tensors.read(f"{name}.weight"))
            bias = tensors.read(f"{name}.bias") if f"{name}.bias" in tensors else None
        solved_DS = weight.double().numpy()[:, kept_S]
        if task.is_changed(site):
            moments = task.record.recording.moments(site)
            if (library := _library(kept_S.size, len(weight))) == "cupy":
                self._twin = None  # torch and CuPy keep separate memory pools
                torch.cuda.empty_cache()
            start_DS = least_squares(weight.double().numpy(), moments, kept_S, task.ridge, library)
            start_DS = start_DS if bias is None else np.column_stack([start_DS, bias.double().numpy()])
            refitted_DS = refit(arrays.to_device(start_DS, library), *self._products(site, library), task.ridge)
            solved_DS = arrays.to_numpy(refitted_DS)
            del refitted_DS
            arrays.free_memory()
        weight_DS = torch.from_numpy(solved_DS[:, : kept_S.size]).to(weight.dtype)
        found = {f"{name}.weight": self._family.oriented(weight_DS)}
        if bias is not None and task.is_changed(site):
            found[f"{name}.bias"] = torch.from_numpy(solved_DS[:, -1]).to(bias.dtype)
        stored = {key: tensor.contiguous() for key, tensor in found.items()}
        write_bytes(task.folder / f"{site.key}.safetensors", save(stored, metadata={"digest": task.digest}))

    def _products(self, site: Site, library: arrays.Library) -> tuple[Products, Products | None]:
        """Over most shards, and over the last quarter of them to hold out; summed in their order."""
        size = self._task.record.shard_sequences
        shards = -(-self._sample.sequences // size)
        parts = [Observe(site, shard).name for shard in range(shards)]
        fitted = max(1, shards - max(1, shards // 4))
        if fitted > 1 and 8 * (self._sample.sequences - fitted * size) < self._sample.sequences:
            fitted -= 1  # the last shard has few sequences
        held_out = self._summed(parts[fitted:], library) if shards > 1 else None
        return self._summed(parts[:fitted], library), held_out

    def _summed(self, names: Sequence[str], library: arrays.Library) -> Products:
        parts = (sealed.read(self._task.sums, name) for name in names)
        first = next(parts)
        gram_SS, cross_SD = first["gram"].double().numpy(), first["cross"].double().numpy()
        for part in parts:
            gram_SS += part["gram"].numpy()
            cross_SD += part["cross"].numpy()
        return Products(arrays.to_device(gram_SS, library), arrays.to_device(cross_SD, library))

    def _batches(self, layer: int, shard: int, sequences: range) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        """What goes into the layer, of the model as it is and as it will be, batch by batch."""
        if layer:
            whole, left = (boundary.read(stream, layer, shard) for stream in self._task.streams)
        else:
            whole = left = torch.from_numpy(self._inputs[sequences.start : sequences.stop].copy())
        for part in self._sample.batches(sequences, self._batch):
            yield part, part.of(whole), part.of(left)

    def _at(self, layer: int, before: Site | None = None) -> TwinLayer:
        """The layer, repaired up to a site or as a whole; the weights of another one are dropped first."""
        task = self._task
        if self._twin is None or self._twin.layer != layer:
            self._twin = None
            block = Block(layer, layer + 1, int(self._config["num_hidden_layers"]))
            self._twin = TwinLayer(task.record.model_dir, task.record.numerics, block, task.kept)
        for site in task.sites:
            if site.layer == layer and site not in self._twin.repaired and (before is None or site < before):
                self._twin.repair(site, load_file(self._solved_file(site)))
        return self._twin

    def _solved_file(self, site: Site) -> Path:
        """What another worker may have solved a moment ago: a network file system shows it when it pleases."""
        path = self._task.folder / f"{site.key}.safetensors"
        deadline = time.monotonic() + PATIENCE
        while not is_repaired(self._task.folder, site, self._task.digest):
            if time.monotonic() > deadline:
                raise DataError(f"{path} is not there {PATIENCE:g} s after it was written; is its folder shared?")
            time.sleep(PATIENCE / 100)
        return path


def _library(signals: int, outputs: int) -> arrays.Library:
    """The device's, where a solve takes less than half of it; else NumPy."""
    library = arrays.choose()[0]
    return library if library == "cupy" and solver_bytes(signals, outputs) < memory.measure(1) / 2 else "numpy"
