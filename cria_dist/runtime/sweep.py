"""A sweep on Ray Tune: record and score once on all workers, prune and recover in trials, measure one after another.

Trials do not time anything, for they share the machine: what a budget of time is counted in is there before they
begin. When all are through, every run is finished by itself: its latency, its report. A sweep that was interrupted goes
on: Tune knows which trials are done, and each run knows how far it is.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import torch

from cria_dist import locks
from cria_dist.errors import ConfigError, CriaError, WorkerError
from cria_dist.pipeline import Context, latency, prune
from cria_dist.pool import LocalPool
from cria_dist.records import Stage
from cria_dist.report.progress import Progress
from cria_dist.runtime import trials
from cria_dist.runtime.launch import train_here
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.session import gpus_per_worker, grows, ray_session
from cria_dist.runtime.shared import check_shared
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages import sweep_results
from cria_dist.stages.job import Job
from cria_dist.stages.prepare import prepare
from cria_dist.stages.sweep import Sweep
from cria_dist.stages.sweep_table import Row, row
from cria_dist.stages.trial import Trial


@dataclass(frozen=True, slots=True)
class Share:
    """What one trial may use.

    Attributes:
        sweep: where trials are compared while they recover.
        workers: worker processes.
        gpus: GPUs of each.
    """

    sweep: Sweep
    workers: int
    gpus: float

    @contextmanager
    def context(self, trial: Trial, until: Stage = "evaluate") -> Generator[Context]:
        """The surroundings of a trial's run, for this process alone; its folder says how the block ended.

        Raises:
            ConfigError: it cannot be carried out, or another process is at it.
        """
        with locks.alone(trial.folder):
            job = prepare(trial.config, until)
            context = self._context(trial, job, Progress(job.folder))
            state = "failed"
            try:
                yield context
                state = "done"
            finally:
                context.pool.release()
                context.progress.close(state)

    def _context(self, trial: Trial, job: Job, progress: Progress) -> Context:
        race = self.sweep.race(trial)
        if trial.config.run.pool == "local":
            torch.set_num_threads(1)  # see launch.py
            return Context(job, LocalPool(), train_here, progress, race)
        trainer = RayTrainer(trial.config.recover.workers, self.gpus > 0, grows(trial.config))
        pool = RayPool(self.workers, self.gpus, grows(trial.config), together=self.sweep.base.run.workers)
        return Context(job, pool, trainer, progress, race)


def run(sweep: Sweep) -> list[Row]:
    """Carry out a sweep, or go on with it; writes ``sweep.json``, ``pareto.png`` and ``best/`` into its folder.

    Raises:
        ConfigError: a trial cannot be carried out, or the cluster is too small for so many at the same time.
        WorkerError: trials failed; the others are finished.
    """
    models = {prepare(trial.config).model_dir for trial in (*sweep.trials, *sweep.corners)}
    with locks.alone(sweep.folder), ray_session(sweep.base) as workers:
        for model_dir in models:
            check_shared(model_dir, sweep.folder)  # the runs lie beside it
        return carry_out(sweep, workers)


def carry_out(sweep: Sweep, workers: int) -> list[Row]:
    """:func:`run` inside a session with so many workers."""
    gpus = gpus_per_worker(sweep.base)
    _check_room(sweep, workers, "GPU" if gpus else "CPU")
    everything, share = Share(sweep, workers, gpus), Share(sweep, max(workers // sweep.concurrency, 1), gpus)
    progress = Progress(sweep.folder, interactive=False)  # the runs have displays of their own
    progress.note(f"sweep folder {sweep.folder}: {sweep.count} trials, {sweep.concurrency} at a time")
    state = "failed"
    try:
        _share_scores(sweep, everything, progress)
        _share_times(sweep, everything, progress)
        tried = trials.carry_out(sweep, share.context, progress)
        rows, failures = _measure(tried.trials, everything, progress)
        sweep_results.write(rows, sweep.folder)
        if failures := {**tried.failures, **failures}:
            raise WorkerError("sweep", "; ".join(f"trial {label}: {why}" for label, why in failures.items()))
        state = "done"
        return rows
    finally:
        progress.close(state)


def _share_scores(sweep: Sweep, share: Share, progress: Progress) -> None:
    """Record and score once what several trials read; they take it over."""
    distinct = {trial.score_key: trial for trial in reversed(sweep.trials)}
    with progress.stage("record and analyse", total=len(distinct), unit="methods") as bar:
        for trial in reversed(distinct.values()):
            with _left_to_it(trial, progress), share.context(trial, "analyse") as context:
                prune(context, trial.command, "analyse")
            bar.advance()


def _share_times(sweep: Sweep, share: Share, progress: Progress) -> None:
    """Measure once what a budget of time is counted in: trials would disturb each other, so they take it over."""
    if not sweep.timed:
        return
    with progress.stage("measure latency", total=len(sweep.timed), unit="trials") as bar:
        for trial in sweep.timed:
            with _left_to_it(trial, progress), share.context(trial, "decide") as context:
                latency.table(context)
            bar.advance()


@contextmanager
def _left_to_it(trial: Trial, progress: Progress) -> Generator[None]:
    """What fails for a trial before it begins fails again in it, and is its failure alone."""
    try:
        yield
    except CriaError as error:
        progress.note(f"trial {trial.label}: {error}")


def _measure(finished: Sequence[Trial], share: Share, progress: Progress) -> tuple[list[Row], dict[str, str]]:
    """Finish every run: latency, loading test, report; the rows, and why others have none, by label."""
    rows, failures = list[Row](), dict[str, str]()
    with progress.stage("measure", total=len(finished), unit="trials") as bar:
        for trial in finished:
            try:
                with share.context(trial) as context:
                    rows.append(_finish(trial, context))
            except CriaError as error:
                failures[trial.label] = str(error)
            else:
                if rows[-1].stopped:
                    progress.note(f"{rows[-1].stopped}; to go on: {trial.command}")
            bar.advance()
    return rows, failures


def _finish(trial: Trial, context: Context) -> Row:
    report = prune(context, trial.command)
    if report is None:
        raise TypeError("a run that is not told to stop ends with a report")
    return row(trial.label, trial.command, context.job.folder, report, context.stopped)


def _check_room(sweep: Sweep, workers: int, kind: str) -> None:
    """Workers of all trials at a time must find a place; they, and Ray Train's, would wait for it."""
    if sweep.base.run.pool == "local" or grows(sweep.base):
        return
    if sweep.concurrency > workers:
        raise ConfigError(
            f"sweep.concurrency={sweep.concurrency} is more than there are workers ({workers}), and every trial needs "
            "one; lower sweep.concurrency"
        )
    each = [
        trial.config.training_workers * (trial.config.recover.gpus_per_worker if kind == "GPU" else 1)
        for trial in (*sweep.trials, *sweep.corners)
    ]
    needed = sweep.concurrency * max(each)
    there = int(ray.cluster_resources().get(kind, 0))
    if needed > there:
        raise ConfigError(
            f"sweep.concurrency={sweep.concurrency} trials need {needed} {kind}s for their training workers and the "
            f"cluster has {there}; lower sweep.concurrency or recover.workers"
        )
