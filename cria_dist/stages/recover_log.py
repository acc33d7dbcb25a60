"""The loss log of a recovery: a JSON line per step that survives torn lines, resumption and several readers."""

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cria_dist import files


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps logged so far; lines that a crash tore are left out, of a step logged twice the later one counts."""
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            steps[line["step"]] = line
    return [line for _, line in sorted(steps.items())]


def cut_log(path: Path, steps: int) -> None:
    """Keep the lines up to the step training continues from."""
    kept = [line for line in read_log(path) if line["step"] <= steps]
    files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def append_log(path: Path, **record: float) -> None:
    """Add the line of one step."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")


@contextmanager
def following(log_path: Path, advance: Callable[[int, int], None], tokens_per_step: int) -> Generator[None]:
    """Report the steps that training workers log, from a thread, until the block ends."""
    finished = threading.Event()
    seen = 0

    def follow() -> None:
        nonlocal seen
        while True:
            last = finished.wait(1.0)
            steps = len(read_log(log_path))
            if steps > seen:
                advance(steps - seen, (steps - seen) * tokens_per_step)
                seen = steps
            if last:
                return

    follower = threading.Thread(target=follow, name="follow-recovery", daemon=True)
    follower.start()
    try:
        yield
    finally:
        finished.set()
        follower.join()
