"""The ``cria`` command: the stages of a run, one verb each; ``jobs/`` call the same functions."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from cria_dist import config_file
from cria_dist.errors import ConfigError, CriaError, DataError, PlanError
from cria_dist.records import Stage

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Verb = Stage | Literal["prune"]
ConfigPath = Annotated[str, typer.Argument(help="TOML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as often as needed.")]
Probe = Annotated[bool, typer.Option("--probe", help="Record a part of the model in this process and time it.")]
Folder = Annotated[Path, typer.Argument(help="Run folder.")]

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
LOG_COLUMNS = 120
VERBS: dict[Verb, str] = {
    "record": "Observe the model on the calibration data: signals and moments of every site.",
    "analyse": "Record, then score every site.",
    "decide": "Record, analyse, then write plan.json.",
    "apply": "Everything up to the pruned and repaired checkpoint.",
    "recover": "Everything up to the recovered checkpoint.",
    "evaluate": "Everything up to the measurements and the report.",
    "prune": "The whole run: record, analyse, decide, apply, recover, evaluate, report.",
}


def main(arguments: Sequence[str], until: Verb) -> int:
    """Run a job: ``CONFIG.toml [key=value ...]`` up to a stage; returns the exit code."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as in Ray workers: the same sums in this process; before torch
    if not arguments or arguments[0].startswith("-"):
        return _complain(ConfigError("usage: CONFIG.toml [dotted.key=value ...]"))
    return guarded(lambda: _run(arguments[0], arguments[1:], until))


def guarded(action: Callable[[], None]) -> int:
    """Run an action; one of our errors becomes one line on standard error and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        action()
    except (ConfigError, DataError, PlanError) as error:
        return _complain(error)
    except CriaError as error:
        sys.stderr.write(f"failed: {error}\nRun the same command again to continue from what is finished.\n")
        return EXIT_FAILURE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue from what is finished\n")
        return EXIT_FAILURE
    return 0


def _complain(error: CriaError) -> int:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return EXIT_USER_ERROR


def _console() -> Console:
    """The terminal as it is; in a job log wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_COLUMNS)


def _run(path: str, overrides: Sequence[str], until: Verb) -> None:
    settings = config_file.load(path, overrides)
    from cria_dist.runtime import launch  # ray, torch and transformers: seconds that --help and typos need not pay

    console = _console()
    job, report = launch.run(settings, "evaluate" if until == "prune" else until)
    if report is None:
        console.print(f"{until}: finished in {job.folder}", soft_wrap=True, highlight=False)
        return
    from cria_dist.report import tables

    for table in (tables.variants_table(report), tables.comparison_table(report), tables.generations_table(report)):
        console.print(table)
    console.print(f"report: {job.folder / 'report.html'}", soft_wrap=True, highlight=False)


def _add_verb(name: Verb, text: str) -> None:
    @app.command(name, help=text)
    def verb(config: ConfigPath, overrides: Overrides = None) -> None:  # pyright: ignore[reportUnusedFunction]  (typer's)
        raise typer.Exit(main([config, *(overrides or [])], name))


@app.command()
def estimate(config: ConfigPath, overrides: Overrides = None, probe: Probe = False) -> None:
    """What a run will take, from the configuration and the model's shapes; nothing is started."""

    def action() -> None:
        settings = config_file.load(config, overrides or [])
        from cria_dist.stages.estimate import estimate as estimate_run  # transformers; see _run

        table = Table("quantity", "value")
        for name, value in estimate_run(settings, probe).items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        _console().print(table)

    raise typer.Exit(guarded(action))


@app.command()
def status(folder: Folder) -> None:
    """How far a run is, from its folder alone (no cluster needed)."""

    def action() -> None:
        from cria_dist.files import read_json

        Console().print_json(json.dumps(read_json(folder / "progress.json")))

    raise typer.Exit(guarded(action))


@app.command()
def report(folder: Folder) -> None:
    """Draw report.html and the plots again from a finished run folder."""

    def action() -> None:
        from cria_dist.stages.redraw import redraw

        Console().print(f"report: {redraw(folder)}", soft_wrap=True, highlight=False)

    raise typer.Exit(guarded(action))


@app.command("export-activations")
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
        from cria_dist.stages import export_activations as exports  # pyarrow; see _run

        written = exports.export_activations(run_folder, out, exports.Choice(layout, site, signal, round_index))
        Console().print(f"{len(written)} files in {out}", soft_wrap=True, highlight=False)

    raise typer.Exit(guarded(action))


for _name, _text in VERBS.items():
    _add_verb(_name, _text)
