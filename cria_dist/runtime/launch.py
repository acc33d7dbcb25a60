"""Give the pipeline its surroundings: Ray or this process."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from cria_dist import locks
from cria_dist.config import RunConfig
from cria_dist.pipeline import Context, prune
from cria_dist.pool import LocalPool
from cria_dist.records import Report, Stage
from cria_dist.report.progress import Progress
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.session import gpus_per_worker, grows, ray_session
from cria_dist.runtime.shared import check_shared
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages import training
from cria_dist.stages.job import Job
from cria_dist.stages.prepare import prepare
from cria_dist.stages.recover import Place, RecoverTask
from cria_dist.stages.recover_state import STATE


def run(config: RunConfig, until: Stage = "evaluate") -> tuple[Job, Report | None]:
    """Check the configuration, then carry out the run up to a stage.

    Args:
        config: the configuration.
        until: last stage.

    Returns:
        The checked job, and the report if the run got there.

    Raises:
        CriaError: see :mod:`cria_dist.errors`.
    """
    job = prepare(config, until)
    with locks.alone(job.folder):
        progress = Progress(job.folder)
        progress.note(f"run folder {job.folder}")
        state = "failed"
        try:
            report = _with_pool(job, progress, until)
            state = "done"
        finally:
            progress.close(state)
    return job, report


def _with_pool(job: Job, progress: Progress, until: Stage) -> Report | None:
    if job.config.run.pool == "local":
        torch.set_num_threads(1)  # as in every Ray worker: the same sums in the same order
        with threadpool_limits(1, "blas"):  # NumPy's and SciPy's
            return prune(Context(job, LocalPool(), train_here, progress), command_line(), until)
    with ray_session(job.config) as workers:
        check_shared(job.model_dir, job.folder)
        gpus = gpus_per_worker(job.config)
        pool = RayPool(workers, gpus, grows(job.config))
        progress.note(f"workers: {pool.description}")
        trainer = RayTrainer(job.config.recover.workers, gpus > 0, grows(job.config))
        if job.config.training_workers and until in ("recover", "evaluate"):
            trainer.check_room(job.config.recover.gpus_per_worker)
        context = Context(job, pool, trainer, progress)
        try:
            return prune(context, command_line(), until)
        finally:
            pool.release()


def train_here(task: training.TrainTask, name: str, storage: Path) -> None:
    """Train in this process with one worker; an interrupted training starts again.

    One that a sweep compares with others keeps its last checkpoint, from which it goes on if it was stopped.
    """
    kept = storage / name

    def keep(step: int, write: Callable[[Path], None]) -> None:
        if isinstance(task, RecoverTask) and task.race is not None:
            kept.mkdir(parents=True, exist_ok=True)
            write(kept)

    training.carry_out(task, Place(), kept if (kept / STATE).is_file() else None, keep)


def command_line() -> str:
    """The command that runs this again, with the paths as the user gave them."""
    main = sys.modules["__main__"]
    module = getattr(getattr(main, "__spec__", None), "name", None)
    program = ["python", "-m", module.removesuffix(".__main__")] if module else [os.path.basename(sys.argv[0])]
    return shlex.join([*program, *sys.argv[1:]])
