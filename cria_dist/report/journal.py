"""What a run says of itself on storage: ``progress.json`` (now) and ``log.jsonl`` (what happened)."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

STATUS_NAME = "progress.json"
LOG_NAME = "log.jsonl"


def write_whole(path: Path, content: str) -> Path:
    """Replace a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Journal:
    """Writer of the two files; without a folder it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def status(self, record: Mapping[str, object]) -> None:
        """Replace ``progress.json``."""
        if self._folder is None:
            return
        write_whole(self._folder / STATUS_NAME, json.dumps({**record, "updated": time.time()}) + "\n")

    def event(self, stage: str | None, message: str) -> None:
        """Append one line to ``log.jsonl``."""
        if self._folder is None:
            return
        line = json.dumps({"time": time.time(), "stage": stage, "message": message})
        with (self._folder / LOG_NAME).open("a", encoding="utf-8") as log:
            log.write(line + "\n")
