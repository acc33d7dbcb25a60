"""What a report measures quality by: perplexity of language models, accuracy of classifiers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cria_dist.records import Evaluation, Report
from cria_dist.report import text


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of quality and how it is shown.

    Attributes:
        name: what it is called.
        of: its value, NaN where it is not there.
        show: the value in words.
        beside: a value compared with the dense model's, in words.
        heading: name of the column with the comparison.
        better: which way is better, in words.
        data: what it is measured on.
    """

    name: str
    of: Callable[[Evaluation], float]
    show: Callable[[float], str]
    beside: Callable[[float, float | None], str]
    heading: str
    better: str
    data: str


def _accuracy(evaluation: Evaluation) -> float:
    return math.nan if evaluation.accuracy is None else evaluation.accuracy


PERPLEXITY = Metric(
    "perplexity", lambda one: one.perplexity, text.perplexity, text.times, "x dense", "lower is better", "test text"
)
ACCURACY = Metric(
    "accuracy", _accuracy, text.percent, text.points, "points to dense", "higher is better", "test examples"
)


def metric_of(report: Report) -> Metric:
    """Accuracy where it was measured."""
    measured: Iterable[Evaluation] = (*report.variants, *report.comparison)
    return ACCURACY if any(one.accuracy is not None for one in measured) else PERPLEXITY
