"""One rank of a tensor-parallel recording, as a process of its own: ``python rank_process.py STEPS OUTCOMES``.

Every step is a recording by a process group of its own; ``RANK`` and the like are in the environment.
"""

import os
import pickle
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from cria_dist.models import ranks
from cria_dist.stages.record import Recorder
from cria_dist.store.storage import LocalStorage


@dataclass(frozen=True)
class SlowStorage(LocalStorage):
    """Waits before every write."""

    def write(self, name: str, content: bytes) -> None:
        time.sleep(0.05)
        super().write(name, content)


def record(step: dict[str, Any], rank: int) -> list[Any]:
    """Results of the items; a rank with a fault stops at its second item."""
    task = step["task"]
    if step.get("slow_rank") == rank:
        storage = SlowStorage(task.recording.storage.folder)
        task = replace(task, recording=replace(task.recording, storage=storage))
    recorder = Recorder(task, step["size"])
    results = []
    for item in step["items"]:
        if results and rank == 1 and step.get("fault") == "dies":
            os._exit(1)
        if results and rank == 1 and step.get("fault") == "hangs":
            time.sleep(step["timeout"] + 4)
            break
        results.append(recorder(item))
    return results


def main() -> None:
    torch.set_num_threads(1)
    rank, outcomes = int(os.environ["RANK"]), []
    for step in pickle.loads(Path(sys.argv[1]).read_bytes()):
        os.environ["CRIA_MEETING"] = step["place"]
        ranks.TIMEOUT = timedelta(seconds=step.get("timeout", 120))
        started = time.monotonic()
        try:
            outcomes.append((record(step, rank), 0.0))
        except RuntimeError as error:
            outcomes.append((f"{type(error).__name__}: {error}", time.monotonic() - started))
        Path(sys.argv[2]).write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    main()
