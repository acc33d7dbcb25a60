"""The verbs that run something: the stages of a run; ``jobs/`` call :func:`main` too."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cria_dist import config_file
from cria_dist.cli.frame import complain, console, guarded
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.records import Stage

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of what ``ray job submit`` starts."""
Verb = Stage | Literal["prune", "sweep"]
VERBS: dict[Verb, str] = {
    "record": "Observe the model on the calibration data: signals and moments of every site.",
    "analyse": "Record, then score every site.",
    "decide": "Record, analyse, then write plan.json.",
    "apply": "Everything up to the pruned and repaired checkpoint.",
    "recover": "Everything up to the recovered checkpoint.",
    "evaluate": "Everything up to the measurements and the report.",
    "prune": "The whole run: record, analyse, decide, apply, recover, evaluate, report.",
    "sweep": "A run for every combination of sweep.grid: a Pareto table and plot, the best model of each budget.",
}


def main(arguments: Sequence[str], until: Verb) -> int:
    """Run a job: ``CONFIG.toml [key=value ...]`` up to a stage, or a sweep; returns the exit code."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as in Ray workers: the same sums in this process; before torch
    if not arguments or arguments[0].startswith("-"):
        return complain(ConfigError("usage: CONFIG.toml [dotted.key=value ...]"))
    if until == "sweep":
        return guarded(lambda: _sweep(arguments[0], arguments[1:]))
    return guarded(lambda: _run(arguments[0], arguments[1:], "evaluate" if until == "prune" else until, until))


def _run(path: str, overrides: Sequence[str], until: Stage, verb: Verb) -> None:
    settings = config_file.load(path, overrides)
    if IN_A_JOB in os.environ:
        check_root(settings)
    from cria_dist.runtime import launch  # ray, torch and transformers: seconds that --help and typos need not pay

    screen = console()
    job, report = launch.run(settings, until)
    if report is None:
        screen.print(f"{verb}: finished in {job.folder}", soft_wrap=True, highlight=False)
        return
    from cria_dist.report import tables

    drawn = (tables.variants_table, tables.speed_table, tables.comparison_table, tables.generations_table)
    for table in (draw(report) for draw in drawn):
        if table.row_count:
            screen.print(table)
    screen.print(f"report: {job.folder / 'report.html'}", soft_wrap=True, highlight=False)


def _sweep(path: str, overrides: Sequence[str]) -> None:
    settings, _ = config_file.load_with_sweep(path, overrides)
    if IN_A_JOB in os.environ:
        check_root(settings)
    from cria_dist.stages.sweep import plan

    sweep = plan(path, overrides)
    from cria_dist.report import tables
    from cria_dist.runtime import sweep as runs  # ray, torch and transformers; see _run
    from cria_dist.stages import sweep_table as table

    screen = console()
    rows = runs.run(sweep)
    screen.print(tables.table(table.grid(rows)))
    for budget, row in table.best(rows).items():
        screen.print(f"best of {budget}: {row.command}", soft_wrap=True, highlight=False)
    screen.print(f"sweep: {sweep.folder}", soft_wrap=True, highlight=False)


def check_root(settings: RunConfig) -> None:
    """A relative run folder would lie in a job's temporary copy of the working directory, and be lost with it.

    Raises:
        ConfigError: it is relative.
    """
    name = "run.root" if settings.run.folder is None else "run.folder"
    path = settings.run.folder or settings.run.root
    if not Path(path).is_absolute():
        raise ConfigError(
            f"{name}={path!r} is relative, so it would be lost with the job; set {name}=/folder/all/nodes/see"
        )
