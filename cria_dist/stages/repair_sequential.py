"""Sequential repair: layer by layer, with what the layers before it have left of its inputs after their own repair.

The calibration shards go through the model twice at the same time, as it is and as it will be. A work item observes one
shard at one site, solves a site from all shards, or takes a shard past a layer that is solved.
Shapes: S kept signals of a site (and a column of ones where its output map has a bias), T tokens, D outputs of the map.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from safetensors.torch import load_file, save

from cria_dist import arrays
from cria_dist.errors import NumericError
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
from cria_dist.store.recording import Recording


class SequentialRepairer:
    """Holds one layer at a time, as it is and as it will be; called once per work item."""

    def __init__(self, task: SequentialTask) -> None:
        record = task.record
        self._task = task
        self._config = checkpoint.read_config(record.model_dir)
        self._family = family_of(self._config)
        self._inputs = np.load(record.tokens_path, mmap_mode="r", allow_pickle=False)
        self._sample = sample_of(self._family, self._config, self._inputs, record.sampled_tokens, record.seed)
        self._twin: TwinLayer | None = None

    def __call__(self, step: Step) -> int:
        """Do one step and store what comes out; returns the calibration tokens that went through a layer.

        Raises:
            NumericError: a signal or hidden state is not finite.
            DataError: the checkpoint, or what an earlier step stored, cannot be read.
        """
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
        layer, twin = step.site.layer, self._at(step.site.layer)
        outputs, biased = twin.sizes(step.site)
        width = len(self._task.kept[step.site.key]) * self._family.span(step.site, self._config)
        gram = gram_of(Slice(0, width + biased), width + biased, twin.device)
        cross_SD = torch.zeros(width + biased, outputs, device=twin.device)
        behind = _Behind(len(sequences))
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
        if layer < self._task.sites[-1].layer and (layer + 1, step.shard) not in boundary.stored(whole_stream):
            behind.write(whole_stream, layer + 1, step.shard)  # one pass less for the step behind the layer

    def _advance(self, step: Advance, sequences: range) -> None:
        """Hidden states behind the layer, for the next one."""
        twin, behind = self._at(step.layer), step.layer + 1
        found = {
            (number, stream): _Behind(len(sequences))
            for number, stream in enumerate(self._task.streams)
            if (behind, step.shard) not in boundary.stored(stream)
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
            library = _library(kept_S.size, len(weight))
            start_DS = least_squares(weight.double().numpy(), moments, kept_S, task.ridge, library)
            start_DS = start_DS if bias is None else np.column_stack([start_DS, bias.double().numpy()])
            refitted_DS = refit(arrays.to_device(start_DS, library), *self._products(site, library), task.ridge)
            solved_DS = arrays.to_numpy(refitted_DS)
        weight_DS = torch.from_numpy(solved_DS[:, : kept_S.size]).to(weight.dtype)
        found = {f"{name}.weight": self._family.oriented(weight_DS)}
        if bias is not None and task.is_changed(site):
            found[f"{name}.bias"] = torch.from_numpy(solved_DS[:, -1]).to(bias.dtype)
        stored = {key: tensor.contiguous() for key, tensor in found.items()}
        write_bytes(task.folder / f"{site.key}.safetensors", save(stored, metadata={"digest": task.digest}))

    def _products(self, site: Site, library: arrays.Library) -> tuple[Products, Products | None]:
        """Over all shards but the last quarter of them, and over these; summed in their order."""
        shards = -(-self._sample.sequences // self._task.record.shard_sequences)
        parts = [Observe(site, shard).name for shard in range(shards)]
        fitted = max(1, shards - max(1, shards // 4))
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
        for part in self._sample.batches(sequences, self._task.record.batch_sequences):
            yield part, part.of(whole), part.of(left)

    def _at(self, layer: int) -> TwinLayer:
        """The layer, repaired as far as its sites are solved; the weights of another one are dropped first."""
        task = self._task
        if self._twin is None or self._twin.layer != layer:
            self._twin = None
            block = Block(layer, layer + 1, int(self._config["num_hidden_layers"]))
            self._twin = TwinLayer(task.record.model_dir, task.record.numerics, block, task.kept)
        for site in task.sites:
            if site.layer == layer and site not in self._twin.repaired and is_repaired(task.folder, site, task.digest):
                self._twin.repair(site, load_file(task.folder / f"{site.key}.safetensors"))
        return self._twin


def _library(signals: int, outputs: int) -> arrays.Library:
    """The device's, where a solve takes less than half of it and leaves the rest to the layer; else NumPy."""
    library = arrays.choose()[0]
    return library if library == "cupy" and solver_bytes(signals, outputs) < memory.measure(1) / 2 else "numpy"


class _Behind:
    """Hidden states behind a layer, put together from batches.

    Args:
        sequences: how many of them.
    """

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._values: torch.Tensor | None = None

    def put(self, part: Batch, hidden: torch.Tensor) -> None:
        """Add a batch."""
        if self._values is None:  # the first batch has the longest sequences
            self._values = torch.zeros(self._sequences, *hidden.shape[1:], dtype=hidden.dtype)
        part.put(self._values, hidden.cpu())

    def write(self, stream: Recording, layer: int, shard: int) -> None:
        """Store them as those before ``layer``."""
        if self._values is not None:
            boundary.write(stream, layer, shard, self._values)
