"""The loss log of a recovery: a JSON line per step that survives torn lines, resumption and several readers."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.stages.follow import followed


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps logged so far; lines that a crash tore are left out, of a step logged twice the later one counts.

    Raises:
        DataError: a line is not text, or JSON of something else.
    """
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _damaged(path, number, "it is not text") from error
        with suppress(ValueError):  # torn
            found = json.loads(text)
            if not isinstance(found, dict) or not isinstance(found.get("step"), int):
                raise _damaged(path, number, "it has no step")
            steps[found["step"]] = found
    return [found for _, found in sorted(steps.items())]


def _damaged(path: Path, number: int, reason: str) -> DataError:
    return DataError(f"{path}, line {number}, is not of a loss log ({reason}); delete the line, or the file")


def cut_log(path: Path, steps: int) -> None:
    """Keep the lines up to the step training continues from."""
    kept = [line for line in read_log(path) if line["step"] <= steps]
    files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def append_log(path: Path, **record: float) -> None:
    """Add the line of one step."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")


def following(
    log_path: Path, advance: Callable[[int, int], None], tokens_per_step: int
) -> AbstractContextManager[None]:
    """Report the steps that training workers log, from a thread, until the block ends."""
    seen = 0

    def look() -> None:
        nonlocal seen
        steps = len(read_log(log_path))
        if steps > seen:
            advance(steps - seen, (steps - seen) * tokens_per_step)
            seen = steps

    return followed(look, 1.0, "follow-recovery")
