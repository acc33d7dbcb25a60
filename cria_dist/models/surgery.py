"""Removing units for good: rows, columns and whole layers leave the tensors, widths and depth leave the config."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from cria_dist.errors import PlanError
from cria_dist.models import checkpoint, depth, writing
from cria_dist.models.experts import assembled, taken_apart
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.models.operations import Operations, Selection
from cria_dist.models.stored import StoredTensors
from cria_dist.models.streaming import Piece, WindowReader, in_memory, write_pieces
from cria_dist.records import Site


@dataclass(frozen=True)
class Surgery:
    """One removal, ready to be carried out on a checkpoint or on a loaded model.

    Attributes:
        family: adapter of the model.
        config: config of the model operated on.
        kept: surviving indices per site key, in the numbering of the model operated on.
        repair: folder with replacement tensors of the repair, or None.
        output_bias: the repair adds a bias to every output map.
    """

    family: MlpFamily
    config: ModelDict
    kept: Mapping[str, tuple[int, ...]]
    repair: Path | None = None
    output_bias: bool = False

    def pruned_config(self) -> dict[str, object]:
        """Config of the pruned model."""
        widths = {key: len(kept) for key, kept in depth.within_layers(self.kept).items()}
        narrowed = self.family.narrowed(self.config, widths, self.output_bias) if widths else self.config
        return depth.shallower(narrowed, self.layers, self.family.width_key)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that stay, in the numbering of the model operated on."""
        return depth.surviving(self.kept, self.config)

    def selections(self) -> dict[str, list[tuple[Selection, int]]]:
        """For each tensor that changes: the kept units and the dimension they lie along, of every site it belongs to.

        Raises:
            PlanError: the plan has other sites than the model, or indices that are not distinct units in order.
        """
        planned = depth.within_layers(self.kept)
        if not planned and depth.removes_layers(self.kept):
            return {}
        parts, stay = {key.rpartition(".")[2] for key in planned}, self.layers
        widths = {site.key: width for site, width in self.family.widths(self.config, parts).items()}
        if planned.keys() != widths.keys():
            odd = min(planned.keys() ^ widths.keys())
            raise PlanError(f"the plan does not fit the model: {odd} is in one of the two only; decide again")
        chosen: dict[str, list[tuple[Selection, int]]] = {}
        for key, kept in planned.items():
            if Site.from_key(key).layer not in stay:
                continue
            if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= widths[key]:
                raise PlanError(
                    f"the plan does not fit the model at {key}: {len(kept)} indices are not distinct units in order, "
                    f"below the width {widths[key]}; decide again"
                )
            site, kept_S = Site.from_key(key), torch.tensor(kept, dtype=torch.int64)
            solved = self.family.solved(site, self.config)
            for name, dim in self.family.coupled_tensors(site, self.config).items():
                selection = Selection(kept_S, widths[key], self.family.maps_in(name, site, self.config), name in solved)
                chosen.setdefault(name, []).append((selection, dim))
        return chosen

    def operations(self) -> Operations:
        """What becomes of each tensor.

        Raises:
            PlanError: the plan does not fit, as :meth:`selections` says.
        """
        selections = self.selections()  # first: it looks at the plan
        return Operations(selections, self.replacements(), self.family.rescaled(self.config, self.pruned_config()))

    def numbered(self) -> dict[str, tuple[int, ...]]:
        """The kept units that have tensors of their own, by what these begin with before the unit's number."""
        sites = {self.family.numbered(Site.from_key(key)): kept for key, kept in depth.within_layers(self.kept).items()}
        return {prefix: kept for prefix, kept in sites.items() if prefix is not None}

    def replacements(self) -> Mapping[str, torch.Tensor]:
        """Tensors the repair re-solved or added, by name; each is read when it is asked for."""
        if self.repair is None:
            return {}
        return StoredTensors([self.repair / f"{key}.safetensors" for key in self._repaired()])

    def _repaired(self) -> list[str]:
        """Sites within the layers that stay."""
        stay = set(self.layers)
        return [key for key in depth.within_layers(self.kept) if Site.from_key(key).layer in stay]

    def zero_biases(self) -> dict[str, int]:
        """Names and sizes of input biases that exist only because the repair gave the output map one."""
        if not self.output_bias or self.family.has_bias(self.config):
            return {}
        sites = {key: self.family.modules(Site.from_key(key)) for key in self._repaired()}
        return {
            f"{name}.bias": len(self.kept[key]) for key, modules in sites.items() for name in modules.inputs.values()
        }


def pruned_copy(model: PreTrainedModel, surgery: Surgery) -> PreTrainedModel:
    """The pruned model in memory, sharing the tensors that did not change."""
    operations, family = surgery.operations(), surgery.family
    state, there = dict[str, torch.Tensor](), set[str]()
    for name, tensor in model.state_dict().items():
        pieces = family.pieces(name, tensor.shape)
        if not (pieces and operations.touches(pieces[0][0])):
            there.add(family.on_disk(name))
            state[name] = operations.of(family.on_disk(name), tensor)
            continue
        parts = {one: operations.of(one, part) for one, part in taken_apart(pieces, tensor).items()}
        there |= parts.keys()
        state[name] = assembled(pieces, parts.__getitem__)
    for name, size in surgery.zero_biases().items():
        state[name] = torch.zeros(size, dtype=model.dtype, device=model.device)
    new = {name: operations.replacements[name] for name in operations.replacements if name not in there}
    state |= {name: tensor.to(model.device, model.dtype) for name, tensor in new.items()}
    pruned = checkpoint.empty_model(surgery.pruned_config())
    stay = f"{family.layers}.", surgery.layers
    pruned.load_state_dict(depth.renumbered(state, *stay), strict=True, assign=True)
    pruned.tie_weights()
    _copy_buffers(depth.renumbered(dict(model.named_buffers()), *stay), pruned)
    return pruned.eval()


def write_pruned(source: Path, target: Path, surgery: Surgery) -> None:
    """Write the pruned checkpoint, one tensor in memory at a time; files that are there are kept.

    Args:
        source: checkpoint to prune.
        target: folder to fill; complete when it holds ``config.json``, which is written last.
        surgery: what to remove and repair.
    """
    operations, config = surgery.operations(), surgery.pruned_config()
    target.mkdir(parents=True, exist_ok=True)
    files = checkpoint.weight_files(source)
    locations = {name: file for file, names in files.items() for name in names}
    for file, names in files.items():
        if not (target / file).exists():
            pieces = _pruned_pieces(source / file, names, operations)
            new = _additions(file, locations, surgery, operations.replacements, next(iter(pieces.values())).like.dtype)
            pieces |= {name: in_memory(tensor) for name, tensor in new.items()}
            for prefix, kept in surgery.numbered().items():
                pieces = depth.renumbered(pieces, prefix, kept)
            left = depth.renumbered(pieces, surgery.family.on_disk(f"{surgery.family.layers}."), surgery.layers)
            if left:
                write_pieces(target / file, left)
    writing.finish(source, target, config)


def _pruned_pieces(path: Path, names: list[str], operations: Operations) -> dict[str, Piece]:
    reader = WindowReader(path)

    def piece(name: str) -> Piece:
        return Piece(operations.of(name, reader.like(name)), lambda: operations.of(name, reader.read(name)))

    return {name: piece(name) for name in names}


def _additions(
    file: str,
    locations: Mapping[str, str],
    surgery: Surgery,
    replacements: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """New tensors (biases of the repair) go into the file that holds the weight they belong to."""
    new = {name: replacements[name].to(dtype) for name in replacements if name not in locations}
    new |= {name: torch.zeros(size, dtype=dtype) for name, size in surgery.zero_biases().items()}
    return {name: tensor for name, tensor in new.items() if locations[name.replace(".bias", ".weight")] == file}


def _copy_buffers(buffers: Mapping[str, torch.Tensor], target: PreTrainedModel) -> None:
    """Buffers outside the state dict (rotary frequencies) are still on the meta device; take the dense model's.

    What Gemma's embedding is multiplied by goes by the hidden size.
    """
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        module = target.get_submodule(parent)
        if leaf == "embed_scale":
            buffer = torch.full_like(buffer, cast(float, module.scalar_embed_scale))
        module.register_buffer(leaf, buffer, persistent=False)
