"""Measure: ours beside what it is compared with, in one run.

    python -m jobs.benchmark NAME [--quick]

Prints a table with medians and spread, writes runs/bench/NAME.json, ends with one line of JSON.
"""

from typing import Annotated

import typer

from jobs.benchmarks import BENCHMARKS
from jobs.benchmarks.frame import publish


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")],
    quick: Annotated[bool, typer.Option(help="Fewer tokens and repeats: does it run at all?")] = False,
) -> None:
    """Measure and publish."""
    if name not in BENCHMARKS:
        raise typer.BadParameter(f"{name!r} is not a benchmark; there are: {', '.join(BENCHMARKS)}")
    publish(BENCHMARKS[name](quick))


if __name__ == "__main__":
    typer.run(main)
