"""What every step of the pipeline shares: the checked job, the pool, the trainer, the progress display."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cria_dist import files
from cria_dist.models import checkpoint
from cria_dist.pool import Flow, Pool
from cria_dist.records import StageTime
from cria_dist.report.progress import Bar, Progress
from cria_dist.stages.halving import Race
from cria_dist.stages.job import Job
from cria_dist.stages.training import TrainTask

Item = TypeVar("Item")
Result = TypeVar("Result")

Train = Callable[[TrainTask, str, Path], None]
"""Carries out a training: task, a name that is unique to it, folder for the trainer's own files."""


@dataclass(frozen=True, slots=True)
class Context:
    """The surroundings of a run.

    Attributes:
        job: what to do.
        pool: where work items run.
        train: how a training is carried out.
        progress: what the user sees.
        race: where a sweep compares this run's recovery with others.
    """

    job: Job
    pool: Pool
    train: Train
    progress: Progress
    race: Race | None = None

    @property
    def stopped(self) -> str | None:
        """What became of a recovery that a sweep stopped early and that has not gone on to its end since."""
        if self.race is None or checkpoint.is_complete(self.job.folder / "recovered"):
            return None
        return self.race.state(self.job.config.recover.steps)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Generator[Bar]:
        """Show a stage, and add its seconds to the run's books (a resumed stage adds up)."""
        started = time.monotonic()
        try:
            with self.progress.stage(name, total=total, unit=unit) as bar:
                yield bar
        finally:
            self._book(name, time.monotonic() - started)

    def map(
        self,
        stage: tuple[str, str],
        make_worker: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        tokens: Callable[[Result], int] = lambda _: 0,
        workers: int | None = None,
        flow: Flow[Item] | None = None,
    ) -> dict[Item, Result]:
        """Run items on the pool under a progress bar; ``stage`` is (name, unit). No items, no stage."""
        results: dict[Item, Result] = {}
        if not items:
            return results
        name, unit = stage
        with self.stage(name, len(items), unit) as bar:
            for item, result in self.pool.map(make_worker, items, workers, flow):
                results[item] = result
                bar.advance(1, tokens=tokens(result))
        return results

    def stage_times(self) -> tuple[StageTime, ...]:
        """Seconds per stage over all invocations of the run."""
        path = self._books
        times = files.read_json(path) if path.is_file() else []
        return tuple(StageTime(stage, seconds) for stage, seconds in times)

    @property
    def _books(self) -> Path:
        return self.job.folder / "timings.json"

    def _book(self, name: str, seconds: float) -> None:
        times = {entry.stage: entry.seconds for entry in self.stage_times()}
        times[name] = times.get(name, 0.0) + seconds
        files.write_json(self._books, list(times.items()))
