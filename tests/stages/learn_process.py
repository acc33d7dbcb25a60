"""One of several training workers, as a process of its own: ``python learn_process.py TASKS RANK WORLD MEETING``."""

import pickle
import sys
from pathlib import Path

import torch

from cria_dist.stages import learn
from cria_dist.stages.recover import Place


def main() -> None:
    torch.set_num_threads(1)
    tasks, place = pickle.loads(Path(sys.argv[1]).read_bytes()), Place(int(sys.argv[2]), int(sys.argv[3]))
    meeting = f"file://{sys.argv[4]}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=place.rank, world_size=place.world)
    for task in tasks:
        learn.train(task, place)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
