"""Repair: re-solve what the surviving output weights of a site do, from the recorded moments."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cria_dist.config import Repair
from cria_dist.errors import NumericError
from cria_dist.files import write_bytes
from cria_dist.maths.repair import least_squares, mean_bias, norm_scale
from cria_dist.models import checkpoint, residual
from cria_dist.models.family import family_of
from cria_dist.models.mlp import signals_of
from cria_dist.models.residual import Stream
from cria_dist.models.streams import StreamFamily
from cria_dist.records import Site
from cria_dist.store.recording import Recording

TOGETHER = 3
"""Maps of the residual stream that are solved at a time: a layer of experts has hundreds."""


@dataclass(frozen=True, slots=True)
class RepairTask:
    """What every repairer is told.

    Attributes:
        recording: moments of the model that is pruned.
        model_dir: that model.
        kept: survivors per site key, in its numbering.
        kind: ``bias`` or ``least_squares``.
        ridge: relative ridge of the least squares.
        folder: where ``<site>.safetensors`` goes.
        digest: digest of the plan and the repair settings.
    """

    recording: Recording
    model_dir: Path
    kept: Mapping[str, tuple[int, ...]]
    kind: Repair
    ridge: float
    folder: Path
    digest: str


class Repairer:
    """Repairs one site per call."""

    def __init__(self, task: RepairTask) -> None:
        self._task = task
        self._config = checkpoint.read_config(task.model_dir)
        self._family = family_of(self._config)

    def __call__(self, site: Site) -> str:
        """Write the replacement tensors of a site; returns its key.

        Raises:
            NumericError: the moments are not finite.
            DataError: a recorded file is missing or damaged.
        """
        task = self._task
        try:
            replaced = self._stream(site) if site.part in residual.PARTS else self._output_map(site)
        except NumericError as error:
            raise NumericError(f"{site.key}: {error}") from error
        stored = {name: tensor.contiguous() for name, tensor in replaced.items()}
        write_bytes(task.folder / f"{site.key}.safetensors", save(stored, metadata={"digest": task.digest}))
        return site.key

    def _output_map(self, site: Site) -> dict[str, torch.Tensor]:
        """The site's output map without what is gone."""
        task, output = self._task, self._family.stored(site).output
        with checkpoint.open_tensors(task.model_dir) as tensors:
            stored_DN = self._family.oriented(tensors.read(f"{output}.weight"))
            biased = site.part == "mlp" and self._family.has_bias(self._config)
            bias_D = tensors.read(f"{output}.bias") if biased else None
        weight_DN = stored_DN.double().numpy()
        moments = task.recording.moments(site)
        kept_S = signals_of(task.kept[site.key], self._family.span(site, self._config))
        if task.kind == "least_squares":
            solved_DS = torch.from_numpy(least_squares(weight_DN, moments, kept_S, task.ridge))
            return {f"{output}.weight": self._family.oriented(solved_DS).to(stored_DN.dtype)}
        shift_D = torch.from_numpy(mean_bias(weight_DN, moments, kept_S))
        bias_D = shift_D if bias_D is None else shift_D + bias_D.double()
        return {f"{output}.bias": bias_D.to(stored_DN.dtype)}

    def _stream(self, site: Site) -> dict[str, torch.Tensor]:
        """The maps that read the residual stream without the dimensions that are gone, and the norms on its way."""
        task, family = self._task, cast(StreamFamily, self._family)
        norms, stream = family.norms(site, self._config), cast(Stream, family.stream)
        maps = [name for name in family.solved(site, self._config) if name not in norms]
        moments, kept_S = task.recording.moments(site), np.asarray(task.kept[site.key], dtype=np.int64)
        replaced: dict[str, torch.Tensor] = {}
        with checkpoint.open_tensors(task.model_dir) as tensors:
            gains = {name: tensors.read(name) for name in norms}
            for first in range(0, len(maps), TOGETHER):
                read = {name: tensors.read(name) for name in maps[first : first + TOGETHER]}
                rows_DN = torch.cat([*read.values()]).double().numpy()
                solved_DS = torch.from_numpy(least_squares(rows_DN, moments, kept_S, task.ridge))
                solved = solved_DS.split([len(one) for one in read.values()])
                replaced |= {name: one.to(read[name].dtype) for name, one in zip(read, solved, strict=True)}
        factors = {name: gain.double() + stream.gain for name, gain in gains.items()}
        own_N = factors[norms[0]].numpy() if stream.norm(site) else np.ones(moments.total_N.size)
        scale = norm_scale(own_N, moments, kept_S)
        scaled = {name: factor[kept_S] * scale - stream.gain for name, factor in factors.items()}
        return replaced | {name: one.to(gains[name].dtype) for name, one in scaled.items()}


def is_repaired(folder: Path, site: Site, digest: str) -> bool:
    """Whether the site was repaired for the same plan and settings."""
    path = folder / f"{site.key}.safetensors"
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as handle:
            return (handle.metadata() or {}).get("digest") == digest
    except SafetensorError:
        return False
