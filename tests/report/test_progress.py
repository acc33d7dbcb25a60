"""Lines, bars and files of the progress display."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cria_dist.records import StageTime
from cria_dist.report.progress import Progress


class Interruption(Exception):
    """Something that went wrong inside a stage."""

    def __str__(self) -> str:
        return "no text [bold]"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(tmp_path: Path, clock: Clock, output: io.StringIO) -> Progress:
    return Progress(tmp_path, console=Console(file=output, width=40), clock=clock)


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "progress.json").read_text())


def log(folder: Path) -> list[tuple[str | None, str]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(record["stage"], record["message"]) for record in map(json.loads, lines)]


def test_plain_lines_come_at_start_every_five_seconds_and_at_the_end(
    progress: Progress, clock: Clock, output: io.StringIO
) -> None:
    with progress.stage("record", total=12, unit="shards") as bar:
        for _ in range(12):
            clock.now += 2.0
            bar.advance(1, tokens=4096)
    assert output.getvalue().splitlines() == [
        "record started, 12 shards",
        "record 3/12 shards, 0.5 shards/s, 2,048 tokens/s, 18.0 s left",
        "record 6/12 shards, 0.5 shards/s, 2,048 tokens/s, 12.0 s left",
        "record 9/12 shards, 0.5 shards/s, 2,048 tokens/s, 6.0 s left",
        "record 12/12 shards, 0.5 shards/s, 2,048 tokens/s, 0.0 s left",
        "record 12/12 shards in 24 s",
    ]


def test_unknown_total_shows_no_time_left(progress: Progress, clock: Clock, output: io.StringIO) -> None:
    with progress.stage("analyse", unit="sites") as bar:
        clock.now += 8.0
        bar.advance(4)
    assert output.getvalue().splitlines() == [
        "analyse started",
        "analyse 4 sites, 0.5 sites/s",
        "analyse 4 sites in 8.0 s",
    ]


def test_stage_without_items_prints_its_time_alone(progress: Progress, clock: Clock, output: io.StringIO) -> None:
    with progress.stage("decide"):
        clock.now += 0.5
    assert output.getvalue().splitlines() == ["decide started", "decide in 0.5 s"]


def test_status_file_is_rewritten_at_most_every_second(progress: Progress, clock: Clock, tmp_path: Path) -> None:
    with progress.stage("record", total=4, unit="shards") as bar:
        assert status(tmp_path)["done"] == 0
        clock.now += 0.5
        bar.advance()
        assert status(tmp_path)["done"] == 0
        clock.now += 1.5
        bar.advance()
        now = status(tmp_path)
        assert now.pop("updated") > 1.7e9
        assert now == {
            "stage": "record",
            "done": 2,
            "total": 4,
            "unit": "shards",
            "rate": 1.0,
            "seconds": 2.0,
            "finished": [],
            "state": "running",
        }
    assert status(tmp_path)["finished"] == [{"stage": "record", "seconds": 2.0}]
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_close_stores_the_final_state_and_the_clock_of_the_last_stage_stands_still(
    progress: Progress, clock: Clock, tmp_path: Path
) -> None:
    with progress.stage("record", total=1) as bar:
        clock.now += 2.0
        bar.advance()
    clock.now += 50.0
    assert status(tmp_path)["state"] == "running"
    progress.close("done")
    assert (status(tmp_path)["state"], status(tmp_path)["seconds"]) == ("done", 2.0)
    assert progress.stages == (StageTime("record", 2.0),)


@pytest.mark.parametrize("interactive", [False, True])
def test_stage_that_raises_is_failed_and_not_counted(
    tmp_path: Path, clock: Clock, output: io.StringIO, interactive: bool
) -> None:
    progress = Progress(tmp_path, interactive, Console(file=output, force_terminal=interactive, width=120), clock)

    def work() -> None:
        with progress.stage("record", total=3, unit="shards") as bar:
            clock.now += 3.0
            bar.advance()
            raise Interruption

    with pytest.raises(Interruption):
        work()
    assert status(tmp_path)["state"] == "failed"
    assert progress.stages == ()
    assert log(tmp_path) == [("record", "record failed at 1/3 shards after 3.0 s: Interruption: no text [bold]")]
    assert "Interruption: no text [bold]" in output.getvalue()


def test_notes_and_stage_ends_are_logged(progress: Progress, output: io.StringIO, tmp_path: Path) -> None:
    progress.note("backend: NumPy (no GPU) [a note far longer than the forty columns of this console]")
    with progress.stage("apply"):
        progress.note("inside")
    progress.note("after")
    assert "of this console]" in output.getvalue().splitlines()[0]
    assert [stage for stage, _ in log(tmp_path)] == [None, "apply", "apply", None]


def test_terminal_shows_live_bars_that_vanish_behind_one_line_per_stage(clock: Clock, output: io.StringIO) -> None:
    progress = Progress(None, console=Console(file=output, force_terminal=True, width=120), clock=clock)
    for name in ("record", "analyse"):
        with progress.stage(name, total=2, unit="sites") as bar:
            clock.now += 4.0
            bar.advance(2, tokens=800)
    shown = output.getvalue()
    assert "2/2 sites" in shown
    assert "200 tokens/s" in shown
    assert "\x1b[2K" in shown
    assert "record 2/2 sites in 4.0 s" in shown
    assert "analyse 2/2 sites in 4.0 s" in shown


def test_without_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: io.StringIO
) -> None:
    monkeypatch.chdir(tmp_path)
    progress = Progress(None, console=Console(file=output))
    with progress.stage("record"):
        progress.note("text")
    progress.close()
    assert list(tmp_path.iterdir()) == []


def test_import_leaves_matplotlib_alone() -> None:
    code = "import sys, cria_dist.report.progress; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
