"""What every verb shares: the terminal, our errors as one line, exit codes."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cria_dist.errors import ConfigError, CriaError, DataError, PlanError

ConfigPath = Annotated[str, typer.Argument(help="TOML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as often as needed.")]
Folder = Annotated[Path, typer.Argument(help="Run folder.")]

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
LOG_COLUMNS = 120


def guarded(action: Callable[[], int | None]) -> int:
    """Run an action; returns its exit code, or that of one of our errors, told in one line on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return action() or 0
    except (ConfigError, DataError, PlanError) as error:
        return complain(error)
    except CriaError as error:
        sys.stderr.write(f"failed: {error}\nWhat is finished is kept: the same command goes on from there.\n")
        return EXIT_FAILURE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue from what is finished\n")
        return EXIT_FAILURE


def complain(error: CriaError) -> int:
    """Tell a mistake in one line."""
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return EXIT_USER_ERROR


def console() -> Console:
    """The terminal as it is; in a job log wide enough for the tables."""
    ours = Console()
    return ours if ours.is_terminal else Console(width=LOG_COLUMNS)
