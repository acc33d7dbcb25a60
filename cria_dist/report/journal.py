"""What a run says of itself on storage: ``progress.json`` (now) and ``log.jsonl`` (what happened)."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from cria_dist import files

STATUS_NAME = "progress.json"
LOG_NAME = "log.jsonl"


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
        files.write_json(self._folder / STATUS_NAME, {**record, "updated": time.time()})

    def event(self, stage: str | None, message: str) -> None:
        """Append one line to ``log.jsonl``."""
        if self._folder is None:
            return
        line = json.dumps({"time": time.time(), "stage": stage, "message": message})
        with (self._folder / LOG_NAME).open("a", encoding="utf-8") as log:
            log.write(line + "\n")
