"""The verb that sends a run to a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from cria_dist import config_file, files
from cria_dist.cli import running
from cria_dist.cli.frame import guarded
from cria_dist.errors import ConfigError

Command = Annotated[
    list[str],
    # Rich takes plain brackets for markup
    typer.Argument(help=f"VERB CONFIG \\[key=value ...]; VERB is one of: {', '.join(running.VERBS)}."),
]
Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster; forward its port if needed.")
]
WorkingDir = Annotated[
    Path | None, typer.Option(help="Folder that travels with the job, less what is hidden in it; default: CONFIG's.")
]
Python = Annotated[str, typer.Option(help="Interpreter on the cluster that has this package.")]
Again = Annotated[bool, typer.Option("--again", help="Submit another attempt although the last one succeeded.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the call as a `ray job submit` line and stop.")]


def submit(
    command: Command,
    address: Address = "http://127.0.0.1:8265",
    working_dir: WorkingDir = None,
    python: Python = "python",
    again: Again = False,
    dry_run: DryRun = False,
) -> None:
    """Run a verb as a job on a cluster, show its log, end with its exit code.

    The same command twice is one job: the second shows the first's log. A job that failed or was stopped gets another
    attempt, which continues from what is in the run folder.
    """

    def action() -> int:
        verb, config, overrides = _parts(command)
        settings, sweep = config_file.load_with_sweep(config, overrides)
        running.check_root(settings)
        folder = (working_dir or Path(config).parent).resolve()
        inside = _relative(Path(config), folder)
        from cria_dist.runtime import submit as jobs  # ray; see running.py

        jobs.check_folder(folder)
        content = files.digest(verb, settings.model_dump(mode="json"), sweep.model_dump(mode="json"))
        there = (python, "-m", "cria_dist", verb, inside, *overrides)
        call = jobs.Call(f"cria-{verb}-{settings.name}-{content[:8]}", there, folder)
        if dry_run:
            typer.echo(call.as_command(address))
            return 0
        return jobs.submit(call, address, again)

    raise typer.Exit(guarded(action))


def _parts(command: list[str]) -> tuple[str, str, list[str]]:
    verb, *arguments = command
    if verb not in running.VERBS or not arguments:
        raise ConfigError(
            f"{' '.join(command)!r} is not VERB CONFIG [key=value ...]; VERB is one of {', '.join(running.VERBS)}"
        )
    return verb, arguments[0], arguments[1:]


def _relative(config: Path, folder: Path) -> str:
    """Where the configuration is in the folder that travels."""
    if not config.resolve().is_relative_to(folder):
        raise ConfigError(f"{config} is not in the working directory {folder}; choose a --working-dir that holds it")
    inside = config.resolve().relative_to(folder)
    if any(part.startswith(".") for part in inside.parts):
        raise ConfigError(
            f"{inside} is hidden in {folder}, and what is hidden does not travel; name it without the dot"
        )
    return str(inside)
