"""The tokens, pixels and labels of a run as files: cut once, taken over by later starts while their source is the same.

Shape suffixes: S sequences, T tokens per sequence.
"""

import functools
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cria_dist import files
from cria_dist.config import CorpusConfig, DataConfig
from cria_dist.errors import DataError
from cria_dist.models.mlp import Takes

log = logging.getLogger(__name__)

SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Cut:
    """One array that was just cut.

    Attributes:
        digest: of its content.
        write: writes the ``.npy`` file.
    """

    digest: str
    write: Callable[[Path], object]


def corpora_of(takes: Takes, data: DataConfig) -> tuple[str, ...]:
    """The corpora a run reads: nothing can be measured on examples without labels."""
    return ("calibration", "test") if takes == "tokens" or data.labelled else ("calibration",)


class InputFiles:
    """``calibration.npy``, ``test.npy`` and the record of what they were cut from, which is written last.

    The labels of examples lie beside them, in ``calibration-labels.npy`` and ``test-labels.npy``.

    Files (text, images, data sets, tokenizer) are told apart by size and time of change, as ``make`` does it: one that
    was only touched is read again and found equal. What is not on this machine (a hub data set, a text deleted since)
    is not asked for again: a run stays on the tokens it began with; ``revision`` pins a hub data set for the next run.

    Args:
        folder: run folder; the files lie in its ``tokens``, ``sentences`` or ``images``.
        takes: what the model takes.
        data: what they are cut from and how.
        model_dir: checkpoint with the tokenizer or image processor.
    """

    def __init__(self, folder: Path, takes: Takes, data: DataConfig, model_dir: Path) -> None:
        self._folder = folder / takes
        self._takes: Takes = takes
        tokenizer = [path for path in model_dir.iterdir() if path.is_file() and path.suffix != ".safetensors"]
        self._origin: dict[str, Any] = {
            "data": data.content_part(),
            **{name: _source_stamp(getattr(data, name)) for name in corpora_of(takes, data)},
            "tokenizer": _stamp(tokenizer, model_dir),
        }

    def digests(self) -> dict[str, str]:
        """Digests as :meth:`name` gives them; empty when the corpus has to be cut: first, changed or damaged."""
        record = self._record()
        then = record.get("origin", {})
        if not record or any(now is not None and now != then.get(key) for key, now in self._origin.items()):
            return {}
        for name, digest in record["files"].items():
            path = self._folder / f"{name}.npy"
            if not path.is_file() or files.file_digest(path) != digest:
                log.warning("%s is damaged or gone: the corpus is read again", path)
                return {}
        return record["digests"]

    def name(self, cuts: Mapping[str, Cut]) -> dict[str, str]:
        """Digests of what was cut, as the run's ``config.json`` names them."""
        keys = {name: name.replace("-", "_") if "-" in name else f"{name}_{self._takes}" for name in cuts}
        return {keys[name]: cut.digest for name, cut in cuts.items()}

    def write(self, cuts: Mapping[str, Cut]) -> None:
        """Write what was cut, then the record."""
        written: dict[str, str] = {}
        for name, cut in cuts.items():
            path = self._folder / f"{name}.npy"
            files.write_with(path, cut.write)
            written[name] = files.file_digest(path)
        record = {"schema": SCHEMA, "origin": self._origin, "files": written, "digests": self.name(cuts)}
        files.write_json(self._record_path, {**record, "digest": files.digest(record)})

    @property
    def _record_path(self) -> Path:
        return self._folder / f"{self._takes}.json"

    def _record(self) -> Mapping[str, Any]:
        """The record of the last :meth:`write`; empty when there is none to trust."""
        path = self._record_path
        if not path.is_file():
            return {}
        try:
            record = files.read_json(path)
        except DataError as error:
            log.warning("%s", error)
            return {}
        digest = record.pop("digest", None)
        if digest != files.digest(record) or record["schema"] != SCHEMA:
            log.warning("%s is damaged or of another version: the corpus is read again", path)
            return {}
        return record


def cut_array(array: np.ndarray) -> Cut:
    """Tokens or labels in memory, ready to be written."""
    kind = [array.dtype.str, list(array.shape)]  # the same text in sequences of another length has the same bytes
    return Cut(files.digest(kind, array.tobytes()), functools.partial(_save, array))


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)


def _source_stamp(corpus: CorpusConfig) -> object:
    """What tells whether the source changed; None where that cannot be told."""
    if corpus.source.startswith("builtin:"):
        return platform.python_version()
    path = Path(corpus.source)
    if path.is_dir():  # of images, there may be a million
        return files.digest(_stamp([entry for entry in path.rglob("*") if entry.is_file()], path))
    return _stamp([path], path.parent) if path.is_file() else None


def _stamp(paths: list[Path], root: Path) -> list[list[object]]:
    """Name, size and time of change of each file."""
    return sorted(
        [path.relative_to(root).as_posix(), state.st_size, state.st_mtime_ns]
        for path, state in ((path, path.stat()) for path in paths)
    )
