"""What is measured on held-out calibration text, and what was found: one small JSON file per item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.config import Repair
from cria_dist.errors import DataError
from cria_dist.models import checkpoint
from cria_dist.records import Site
from cria_dist.store.recording import Recording

FOLDER = "sensitivity"


@dataclass(frozen=True, slots=True)
class LossTask:
    """What everyone who measures losses in a round is told.

    Attributes:
        model_dir: checkpoint that is pruned.
        numerics: how it computes.
        tokens_path: calibration tokens.
        sequences: the held-out ones.
        batch_sequences: sequences per forward pass.
        recording: moments of the model.
        shards: the first so many shards are not held out.
        folder: round folder, with the scores; losses go to its ``sensitivity/``.
        repair: what is done for the removed units.
        ridge: relative ridge of the least squares.
        digest: digest of all that a loss depends on, but for the widths.
    """

    model_dir: Path
    numerics: checkpoint.Numerics
    tokens_path: Path
    sequences: range
    batch_sequences: int
    recording: Recording
    shards: int
    folder: Path
    repair: Repair
    ridge: float
    digest: str


@dataclass(frozen=True, slots=True)
class Probe:
    """One site, to be pruned alone to each of these widths."""

    site: Site
    widths: tuple[int, ...]

    def __str__(self) -> str:
        """Name of the work item."""
        return f"loss without units of {self.site.key}"

    @property
    def name(self) -> str:
        """Name of its result."""
        return self.site.key


@dataclass(frozen=True, slots=True)
class Trial:
    """All sites pruned at once: new widths by site key; none of them is the whole model."""

    name: str
    widths: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """Name of the work item."""
        return f"loss of the {self.name} widths"


def read_losses(folder: Path, item: Probe | Trial, digest: str) -> tuple[float, ...] | None:
    """What was measured of an item, or None if that has not been done with the same model, scores and settings."""
    path = _path(folder, item)
    if not path.is_file():
        return None
    try:
        record = files.read_json(path)
    except DataError:
        return None
    return tuple(record["losses"]) if record["digest"] == digest and record["widths"] == _plain(item) else None


def write_losses(task: LossTask, item: Probe | Trial, losses: Sequence[float]) -> None:
    """Keep what was measured of an item."""
    record = {"digest": task.digest, "widths": _plain(item), "losses": list(losses)}
    files.write_json(_path(task.folder, item), record)


def adopt(task: LossTask, root: Path, item: Probe) -> bool:
    """Take over what a neighbouring run measured: budgets share the curves."""

    def take(other: Path) -> bool:
        if read_losses(other.parent, item, task.digest) is None:
            return False
        files.write_bytes(_path(task.folder, item), _path(other.parent, item).read_bytes())
        return True

    return files.take_over(root, f"*/*/{FOLDER}", take) is not None


def trial(name: str, widths: Mapping[str, int]) -> Trial:
    """An allocation as a work item."""
    return Trial(name, tuple(sorted(widths.items())))


def _path(folder: Path, item: Probe | Trial) -> Path:
    return folder / FOLDER / f"{item.name}.json"


def _plain(item: Probe | Trial) -> list[Any]:
    return list(item.widths) if isinstance(item, Probe) else [list(pair) for pair in item.widths]
