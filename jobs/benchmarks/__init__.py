"""Measurements of this project, one file each; ``BENCHMARKS`` is the list of them."""

from collections.abc import Callable

from jobs.benchmarks import classifiers, demo, quality, record, recover, repair, spectral, surgery
from jobs.benchmarks.frame import Measurement

BENCHMARKS: dict[str, Callable[[bool], Measurement]] = {
    "classifiers": classifiers.measure,
    "demo": demo.measure,
    "quality": quality.measure,
    "record": record.measure,
    "recover": recover.measure,
    "repair": repair.measure,
    "spectral": spectral.measure,
    "surgery": surgery.measure,
}
