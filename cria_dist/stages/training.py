"""What training workers can be asked to do together: recover a model, or learn gates."""

from pathlib import Path

from cria_dist.stages import learn, recover
from cria_dist.stages.learn import LearnTask
from cria_dist.stages.recover import Checkpoint, Place, RecoverTask

TrainTask = RecoverTask | LearnTask


def carry_out(task: TrainTask, place: Place, resume: Path | None, save_checkpoint: Checkpoint) -> None:
    """Train to the end.

    Args:
        task: what to do.
        place: this worker.
        resume: folder written by an earlier checkpoint, or None; learning is short and writes none.
        save_checkpoint: called with the writer of a checkpoint.

    Raises:
        NumericError: the loss is not finite.
    """
    if isinstance(task, LearnTask):
        learn.train(task, place)
    else:
        recover.train(task, place, resume, save_checkpoint)


def stage_of(task: TrainTask) -> str:
    """Name of the stage, for messages."""
    return "learn" if isinstance(task, LearnTask) else "recover"
