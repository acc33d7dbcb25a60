"""The verbs that start nothing: what a run would take, how far one is, what is in its folder."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from cria_dist import config_file, locks
from cria_dist.cli.frame import ConfigPath, Folder, Overrides, console, guarded
from cria_dist.errors import ConfigError

Probe = Annotated[bool, typer.Option("--probe", help="Record a part of the model in this process and time it.")]


def estimate(config: ConfigPath, overrides: Overrides = None, probe: Probe = False) -> None:
    """What a run will take, from the configuration and the model's shapes; nothing is started."""

    def action() -> None:
        settings = config_file.load(config, overrides or [])
        from cria_dist.stages.estimate import estimate as estimate_run  # transformers; see running.py

        table = Table("quantity", "value")
        for name, value in estimate_run(settings, probe).items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        console().print(table)

    raise typer.Exit(guarded(action))


def status(folder: Folder) -> None:
    """How far a run is, from its folder alone: in words on standard error, as JSON on standard output."""

    def action() -> None:
        from cria_dist.files import read_json

        path = folder / "progress.json"
        if not path.is_file():
            raise ConfigError(f"{path} cannot be read (no such file); give a run folder")
        found = read_json(path)
        sys.stderr.write(f"{folder.absolute().name}: {_in_words(found, time.time(), locks.is_at_work(folder))}\n")
        Console().print_json(json.dumps(found))

    raise typer.Exit(guarded(action))


def _in_words(progress: Mapping[str, Any], now: float, is_at_work: bool | None) -> str:
    """What ``progress.json`` says; of a run that was killed it goes on to say that it is running.

    Args:
        progress: its content.
        now: seconds, as its ``updated``.
        is_at_work: whether a process works on the run, where that is known.
    """
    from cria_dist.report import text

    total = "" if progress["total"] is None else f"/{progress['total']}"
    where = f", {progress['stage']} {progress['done']}{total} {progress['unit']}" if progress["stage"] else ""
    said = f"{progress['state']}{where}, last heard of {text.seconds(max(now - progress['updated'], 0))} ago"
    if progress["state"] != "running" or is_at_work:
        return said
    killed = "if it was killed" if is_at_work is None else "no process works on it (killed?)"
    return f"{said}; {killed}, the same command goes on from there"


def report(folder: Folder) -> None:
    """Draw report.html and the plots again from a finished run folder."""

    def action() -> None:
        from cria_dist.stages.redraw import redraw

        Console().print(f"report: {redraw(folder)}", soft_wrap=True, highlight=False)

    raise typer.Exit(guarded(action))


def export_activations(
    run_folder: Folder,
    out: Annotated[Path, typer.Argument(help="New folder; gets one Parquet file per site.")],
    layout: Annotated[
        Literal["list", "binary"], typer.Option(help="list<float> per token, or the recorded words as one value.")
    ] = "list",
    site: Annotated[str | None, typer.Option(help="Only this site, as layer-003.mlp.")] = None,
    signal: Annotated[str | None, typer.Option(help="Only this signal, as output.")] = None,
    round_index: Annotated[int, typer.Option("--round", min=0, help="Round of the run.")] = 0,
) -> None:
    """Write recorded signals as plain Parquet, a row per token, for pandas and DuckDB."""

    def action() -> None:
        from cria_dist.stages import export_activations as exports  # pyarrow; see running.py

        written = exports.export_activations(run_folder, out, exports.Choice(layout, site, signal, round_index))
        Console().print(f"{len(written)} files in {out}", soft_wrap=True, highlight=False)

    raise typer.Exit(guarded(action))
