"""The frame of every benchmark: alternate contenders, show medians and spread, keep every sample."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cria_dist.files import write_json
from cria_dist.report.versions import machine_and_versions

RESULTS = Path("runs/bench")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a benchmark found.

    Attributes:
        name: name of the benchmark.
        protocol: how it was measured, one sentence each.
        metrics: the numbers the benchmark is about.
        samples: raw values per quantity and contender, in the order they were taken.
        units: unit per quantity.
    """

    name: str
    protocol: tuple[str, ...]
    metrics: Mapping[str, float]
    samples: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict[str, dict[str, list[float]]])
    units: Mapping[str, str] = field(default_factory=dict[str, str])


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def alternate(contenders: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Measure contenders in turn, A B A B ..., so that drift of the machine hits all alike.

    Args:
        contenders: each returns its own sample.
        repeats: samples to keep of each.
        warm_up: rounds thrown away before.

    Returns:
        Samples per contender.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warm_up + repeats):
        for name, contender in contenders.items():
            value = contender()
            if index >= warm_up:
                samples[name].append(value)
    return samples


def publish(measurement: Measurement) -> Path:
    """Print the table, write ``runs/bench/NAME.json``, end with one line of JSON; returns the file."""
    console = Console(width=120)
    table = Table(title=measurement.name, title_justify="left")
    for column in ("quantity", "contender", "median", "min", "max", "samples", "unit"):
        table.add_column(column)
    for quantity, contenders in measurement.samples.items():
        for contender, values in contenders.items():
            spread = [f"{value:.4g}" for value in (statistics.median(values), min(values), max(values))]
            table.add_row(quantity, contender, *spread, str(len(values)), measurement.units.get(quantity, ""))
    console.print(table)
    path = RESULTS / f"{measurement.name}.json"
    write_json(path, {**asdict(measurement), "versions": machine_and_versions()})
    console.print(f"all samples: {path}", highlight=False)
    line = {"benchmark": measurement.name, "metrics": dict(measurement.metrics)}
    console.print(json.dumps(line), soft_wrap=True, highlight=False, markup=False)
    return path
