"""Progress of a run: live bars on a terminal, plain lines in a job log, ``progress.json`` in both.

progress = Progress(folder)
with progress.stage("record", total=12, unit="shards") as bar:
    bar.advance(1, tokens=4096)
progress.close("done")
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveDisplay

from cria_dist.records import StageTime
from cria_dist.report import text
from cria_dist.report.journal import Journal

LINE_SECONDS = 5.0
STATUS_SECONDS = 1.0

State = Literal["running", "done", "failed"]


class Bar:
    """How far one stage is; the stage's code calls :meth:`advance`."""

    def __init__(
        self, stage: str, total: int | None, unit: str, clock: Callable[[], float], show: Callable[["Bar"], None]
    ) -> None:
        self.stage = stage
        self.total = total
        self.unit = unit
        self.done = 0
        self.tokens = 0
        self._clock = clock
        self._show = show
        self._started = clock()
        self._ended: float | None = None

    def advance(self, count: int = 1, tokens: int = 0) -> None:
        """Report ``count`` finished items, and the tokens in them where that means something."""
        self.done += count
        self.tokens += tokens
        self._show(self)

    def end(self) -> None:
        """Stop the clock of the stage."""
        self._ended = self._clock()

    @property
    def running(self) -> bool:
        """Whether the stage has not ended."""
        return self._ended is None

    @property
    def seconds(self) -> float:
        """Time the stage has taken."""
        return (self._clock() if self._ended is None else self._ended) - self._started

    @property
    def rate(self) -> float:
        """Items per second over the whole stage."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def position(self) -> str:
        """``3/12 shards``, or ``3 shards`` where the end is unknown."""
        return f"{self.done}/{self.total} {self.unit}" if self.total is not None else f"{self.done} {self.unit}"

    @property
    def pace(self) -> str:
        """Rates and the time left, as far as they are known."""
        parts: list[str] = []
        if self.rate > 0:
            parts.append(f"{text.number(self.rate)} {self.unit}/s")
        if self.tokens and self.seconds > 0:
            parts.append(f"{text.number(self.tokens / self.seconds)} tokens/s")
        if self.rate > 0 and self.total is not None:
            parts.append(f"{text.seconds(max(self.total - self.done, 0) / self.rate)} left")
        return ", ".join(parts)


class Progress:
    """Shows and stores how far a run is. Used from the coordinator's thread only.

    Args:
        folder: where ``progress.json`` and ``log.jsonl`` go; None writes no files.
        interactive: live bars instead of plain lines; None asks the console.
        console: where to print; standard output by default.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        folder: Path | None,
        interactive: bool | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._console = console or Console()
        if interactive is None:
            interactive = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = _live_display(self._console) if interactive else None
        self._journal = Journal(folder)
        self._finished: list[StageTime] = []
        self._bar: Bar | None = None
        self._line_due = self._status_due = clock()

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """Seconds of every stage that finished, in order."""
        return tuple(self._finished)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "items") -> Generator[Bar]:
        """Time a stage and show how far it is; an exception marks the run as failed and is passed on.

        Stages follow one another; they do not nest.
        """
        bar = self._bar = Bar(name, total, unit, self._clock, self._show)
        self._line_due = self._clock() + LINE_SECONDS
        self._start(bar)
        try:
            yield bar
        except BaseException as error:
            bar.end()
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            self._stop(bar, "failed", f"{name} failed at {bar.position} after {text.seconds(bar.seconds)}: {reason}")
            raise
        bar.end()
        self._finished.append(StageTime(name, bar.seconds))
        what = f"{name} {bar.position}" if bar.done or total is not None else name
        self._stop(bar, "running", f"{what} in {text.seconds(bar.seconds)}")

    def note(self, message: str) -> None:
        """Print one plain line and keep it in the log: a stage skipped, a backend chosen."""
        self._say(self._bar.stage if self._bar and self._bar.running else None, message)

    def close(self, state: State = "done") -> None:
        """Store the final state of the run."""
        self._write_status(state)

    def _show(self, bar: Bar) -> None:
        """Bring the display and ``progress.json`` up to date, each no more often than its interval."""
        now = self._clock()
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=bar.done, position=bar.position, pace=bar.pace)
        elif now >= self._line_due:
            self._line_due = now + LINE_SECONDS
            self._line(f"{bar.stage} {bar.position}" + (f", {bar.pace}" if bar.pace else ""))
        if now >= self._status_due:
            self._write_status("running")

    def _start(self, bar: Bar) -> None:
        if self._live is not None:
            self._live.add_task(bar.stage, total=bar.total, position=bar.position, pace="")
            self._live.start()
        else:
            self._line(f"{bar.stage} started" + (f", {bar.total} {bar.unit}" if bar.total is not None else ""))
        self._write_status("running")

    def _stop(self, bar: Bar, state: State, message: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live.remove_task(self._live.task_ids[0])
        self._say(bar.stage, message)
        self._write_status(state)

    def _say(self, stage: str | None, message: str) -> None:
        self._journal.event(stage, message)
        self._line(message)

    def _line(self, message: str) -> None:
        self._console.print(text.printable(message), markup=False, highlight=False, soft_wrap=True)

    def _write_status(self, state: State) -> None:
        self._status_due = self._clock() + STATUS_SECONDS
        bar = self._bar
        self._journal.status(
            {
                "stage": bar.stage if bar else None,
                "done": bar.done if bar else 0,
                "total": bar.total if bar else None,
                "unit": bar.unit if bar else None,
                "rate": bar.rate if bar else 0.0,
                "seconds": bar.seconds if bar else 0.0,
                "finished": [asdict(finished) for finished in self._finished],
                "state": state,
            }
        )


def _live_display(console: Console) -> LiveDisplay:
    return LiveDisplay(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[position]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[pace]}", style="dim", markup=False),
        console=console,
        transient=True,
        expand=True,
    )
