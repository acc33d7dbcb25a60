"""Repair: re-solve what the surviving output weights of a site do, from the recorded moments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cria_dist.config import Repair
from cria_dist.errors import NumericError
from cria_dist.files import write_bytes
from cria_dist.maths.repair import least_squares, mean_bias
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.records import Site
from cria_dist.store.recording import Recording


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
        task, output = self._task, self._family.stored(site).output
        with checkpoint.open_tensors(task.model_dir) as tensors:
            stored_DN = tensors.read(f"{output}.weight")
            biased = site.part == "mlp" and self._family.has_bias(self._config)
            bias_D = tensors.read(f"{output}.bias") if biased else None
        weight_DN = stored_DN.double().numpy()
        moments = task.recording.moments(site)
        kept_S = signals_of(task.kept[site.key], self._family.span(site, self._config))
        replaced: dict[str, torch.Tensor] = {}
        try:
            if task.kind == "least_squares":
                replaced[f"{output}.weight"] = torch.from_numpy(least_squares(weight_DN, moments, kept_S, task.ridge))
            else:
                shift_D = torch.from_numpy(mean_bias(weight_DN, moments, kept_S))
                replaced[f"{output}.bias"] = shift_D if bias_D is None else shift_D + bias_D.double()
        except NumericError as error:
            raise NumericError(f"{site.key}: {error}") from error
        stored = {name: tensor.to(stored_DN.dtype).contiguous() for name, tensor in replaced.items()}
        write_bytes(task.folder / f"{site.key}.safetensors", save(stored, metadata={"digest": task.digest}))
        return site.key


def signals_of(kept: Sequence[int], span: int) -> NDArray[np.int64]:
    """The signals of some units, ``span`` consecutive ones of each."""
    return (np.asarray(kept, dtype=np.int64)[:, np.newaxis] * span + np.arange(span)).ravel()


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
