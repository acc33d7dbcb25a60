"""One of several training workers, as a process of its own: ``python recover_process.py JOBS RANK WORLD MEETING``."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cria_dist.stages import recover
from cria_dist.stages.recover import Place


def main() -> None:
    """Carry out every (task, folder to resume from or None); checkpoints go beside the log."""
    torch.set_num_threads(1)
    jobs, place = pickle.loads(Path(sys.argv[1]).read_bytes()), Place(int(sys.argv[2]), int(sys.argv[3]))
    meeting = f"file://{sys.argv[4]}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=place.rank, world_size=place.world)
    for task, resume in jobs:

        def save(step: int, write: Callable[[Path], None], states: Path = task.log_path.parent / "states") -> None:
            folder = states / f"{step}-{place.rank}"
            folder.mkdir(parents=True)
            write(folder)

        recover.train(task, place, resume, save)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
