"""Measurements of this project, one file each; ``BENCHMARKS`` is the list of them."""

from collections.abc import Callable

from jobs.benchmarks import demo, quality, record, spectral
from jobs.benchmarks.frame import Measurement

BENCHMARKS: dict[str, Callable[[bool], Measurement]] = {
    "demo": demo.measure,
    "quality": quality.measure,
    "record": record.measure,
    "spectral": spectral.measure,
}
