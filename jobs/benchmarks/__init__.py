"""Measurements of this project, one file each; ``BENCHMARKS`` is the list of them."""

from collections.abc import Callable

from jobs.benchmarks import demo, spectral
from jobs.benchmarks.frame import Measurement

BENCHMARKS: dict[str, Callable[[bool], Measurement]] = {
    "demo": demo.measure,
    "spectral": spectral.measure,
}
