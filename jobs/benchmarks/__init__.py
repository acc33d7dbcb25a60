"""Measurements of this project, one file each; ``BENCHMARKS`` is the list of them."""

from collections.abc import Callable

from jobs.benchmarks import demo, record, spectral
from jobs.benchmarks.frame import Measurement

BENCHMARKS: dict[str, Callable[[bool], Measurement]] = {
    "demo": demo.measure,
    "record": record.measure,
    "spectral": spectral.measure,
}
