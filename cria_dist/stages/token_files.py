"""The tokens of a run as files: cut once, taken over by every later start while what they were cut from is the same.

Shape suffixes: S sequences, T tokens per sequence.
"""

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cria_dist import files
from cria_dist.config import CorpusConfig, DataConfig
from cria_dist.errors import DataError
from cria_dist.records import Int32

log = logging.getLogger(__name__)

NAMES = ("calibration", "test")
RECORD = "tokens.json"
SCHEMA = 1


class TokenFiles:
    """``calibration.npy``, ``test.npy`` and the record of what they were cut from, which is written last.

    Files (text, data sets, tokenizer) are told apart by size and time of change, as ``make`` does it: a file that was
    only touched is read again and found equal. What is not on this machine (a hub data set, a text deleted since) is
    not asked for again: a run stays on the tokens it began with; ``revision`` pins a hub data set for the next run.

    Args:
        folder: folder of the files.
        data: what they are cut from and how.
        model_dir: checkpoint with the tokenizer.
    """

    def __init__(self, folder: Path, data: DataConfig, model_dir: Path) -> None:
        self._folder = folder
        self._data = data
        tokenizer = [path for path in model_dir.iterdir() if path.is_file() and path.suffix != ".safetensors"]
        self._origin: dict[str, Any] = {
            "data": data.model_dump(mode="json"),
            "calibration": _source_stamp(data.calibration),
            "test": _source_stamp(data.test),
            "tokenizer": _stamp(tokenizer, model_dir),
        }

    def digests(self) -> dict[str, str]:
        """Digests as :func:`digests_of` gives them; empty when the text has to be cut: first, changed or damaged."""
        record = self._record()
        then = record.get("origin", {})
        if not record or any(now is not None and now != then.get(key) for key, now in self._origin.items()):
            return {}
        for name in NAMES:
            path = self._folder / f"{name}.npy"
            if not path.is_file() or files.file_digest(path) != record["files"][name]:
                log.warning("%s is damaged or gone: the text is tokenised again", path)
                return {}
        return record["digests"]

    def write(self, tokens: tuple[Int32, Int32]) -> None:
        """Write calibration and test tokens, then the record."""
        written: dict[str, str] = {}
        for name, tokens_ST in zip(NAMES, tokens, strict=True):
            path = self._folder / f"{name}.npy"
            files.write_with(path, lambda temporary, tokens_ST=tokens_ST: _save(temporary, tokens_ST))
            written[name] = files.file_digest(path)
        record = {"schema": SCHEMA, "origin": self._origin, "files": written, "digests": digests_of(tokens)}
        files.write_json(self._folder / RECORD, {**record, "digest": files.digest(record)})

    def _record(self) -> Mapping[str, Any]:
        """The record of the last :meth:`write`; empty when there is none to trust."""
        path = self._folder / RECORD
        if not path.is_file():
            return {}
        try:
            record = files.read_json(path)
        except DataError as error:
            log.warning("%s", error)
            return {}
        digest = record.pop("digest", None)
        if digest != files.digest(record) or record["schema"] != SCHEMA:
            log.warning("%s is damaged or of another version: the text is tokenised again", path)
            return {}
        return record


def digests_of(tokens: tuple[Int32, Int32]) -> dict[str, str]:
    """Digests of calibration and test tokens, as the run's ``config.json`` names them."""
    return {f"{name}_tokens": files.digest(tokens_ST.tobytes()) for name, tokens_ST in zip(NAMES, tokens, strict=True)}


def _save(path: Path, tokens_ST: Int32) -> None:
    with path.open("wb") as handle:
        np.save(handle, tokens_ST, allow_pickle=False)


def _source_stamp(corpus: CorpusConfig) -> object:
    """What tells whether the source changed; None where that cannot be told."""
    if corpus.source.startswith("builtin:"):
        return platform.python_version()
    path = Path(corpus.source)
    if path.is_dir():
        return _stamp([entry for entry in path.rglob("*") if entry.is_file()], path)
    return _stamp([path], path.parent) if path.is_file() else None


def _stamp(paths: list[Path], root: Path) -> list[list[object]]:
    """Name, size and time of change of each file."""
    return sorted(
        [path.relative_to(root).as_posix(), state.st_size, state.st_mtime_ns]
        for path, state in ((path, path.stat()) for path in paths)
    )
