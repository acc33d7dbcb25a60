"""The tables of a report as plain text cells; the terminal and the page show the same ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cria_dist.records import Evaluation, Report, SiteEvidence
from cria_dist.report import text
from cria_dist.report.metrics import metric_of

DEAD_FACTS = frozenset({"dead", "dead_units"})
SPEED = {
    "prefill_ms": "prefill (ms)",
    "decode_ms": "decode (ms)",
    "batch_prefill_ms": "prefill, batch 8 (ms)",
    "batch_decode_ms": "decode, batch 8 (ms)",
    "memory_bytes": "memory, batch 8 (MB)",
}
"""Columns of the speed table; the batch is ``stages.speed.BATCH``."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: a title, a header and rows of text.

    Attributes:
        title: what the table shows.
        header: one name per column; the unit stands in brackets.
        rows: the cells.
        words: number of leading columns that hold words and not numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True, slots=True)
class Contender:
    """One method of the comparison with what it reached at each state of the model."""

    name: str
    pruned: Evaluation | None = None
    repaired: Evaluation | None = None
    recovered: Evaluation | None = None

    def states(self) -> Iterator[tuple[str, Evaluation]]:
        """The states that were measured, by name."""
        for name, value in (("pruned", self.pruned), ("repaired", self.repaired), ("recovered", self.recovered)):
            if value is not None:
                yield name, value


def variant(report: Report, label: str) -> Evaluation | None:
    """The variant of that name, if it was measured."""
    return next((one for one in report.variants if one.label == label), None)


def final(report: Report) -> Evaluation | None:
    """The variant that is handed over: the last one that is not dense."""
    return next((one for one in reversed(report.variants) if one.label != "dense"), None)


def contenders(report: Report) -> tuple[Contender, ...]:
    """This run first, then the compared methods in the order given."""
    found: list[Contender] = []
    end = final(report)
    if end is not None:
        states = {name: variant(report, name) for name in ("pruned", "repaired", "recovered")}
        found.append(Contender(f"{end.method} (this run)", **states))
    compared: list[Contender] = []
    for one in report.comparison:  # a method's rows stand together; another one of the same title begins them anew
        state = "pruned" if one.repair == "none" else "repaired"
        if not compared or compared[-1].name != one.label or getattr(compared[-1], state) is not None:
            compared.append(Contender(one.label))
        compared[-1] = replace(compared[-1], **{state: one})
    return (*found, *_told_apart(compared, report.config.get("compare", ())))


def _told_apart(compared: Sequence[Contender], methods: Sequence[Mapping[str, Any]]) -> Iterator[Contender]:
    """Methods of one title get the options in which they differ beside it."""
    configured = list(zip(compared, methods, strict=False))
    for index, one in enumerate(compared):
        alike = [method for other, method in configured if other.name == one.name]
        own = methods[index] if index < len(methods) else {}
        differing = [f"{key}={value}" for key, value in own.items() if any(other.get(key) != value for other in alike)]
        yield replace(one, name=", ".join((one.name, *differing)))


def variants_grid(report: Report) -> Grid:
    """Size and quality of each variant."""
    dense, metric = variant(report, "dense"), metric_of(report)
    base = metric.of(dense) if dense else None

    def row(one: Evaluation) -> tuple[str, ...]:
        removed = text.percent(1 - one.parameters / dense.parameters) if dense else text.ABSENT
        return (
            one.label,
            text.count(one.parameters),
            removed,
            metric.show(metric.of(one)),
            metric.beside(metric.of(one), base),
            text.megabytes(one.weight_bytes),
        )

    header = (
        "variant",
        "parameters",
        "removed",
        metric.name,
        metric.heading,
        "weights (MB)",
    )
    return Grid("Variants of the model", header, tuple(row(one) for one in report.variants))


def speed_grid(report: Report) -> Grid:
    """Time and memory of each variant, each beside the dense model's: a smaller model that is not faster shows."""
    timed = [one for one in report.variants if one.prefill_ms is not None]
    columns = [name for name in SPEED if any(getattr(one, name) is not None for one in timed)]

    def row(one: Evaluation) -> tuple[str, ...]:
        return (one.label, *(_beside(getattr(one, name), getattr(timed[0], name), name) for name in columns))

    title = "Speed and memory (x dense)"
    return Grid(title, ("variant", *(SPEED[name] for name in columns)), tuple(row(one) for one in timed))


def _beside(value: float | None, base: float | None, name: str) -> str:
    if value is None:
        return text.ABSENT
    shown = text.megabytes(int(value)) if name == "memory_bytes" else text.milliseconds(value)
    return f"{shown} ({text.times(value, base)})"


def comparison_grid(report: Report) -> Grid:
    """Quality of each method at the same ratio."""
    dense, metric = variant(report, "dense"), metric_of(report)
    base = metric.of(dense) if dense else None

    def cell(one: Evaluation | None) -> str:
        return f"{metric.show(metric.of(one))} ({metric.beside(metric.of(one), base)})" if one else text.ABSENT

    rows = tuple((one.name, cell(one.pruned), cell(one.repaired), cell(one.recovered)) for one in contenders(report))
    header = ("method", "pruned", "repaired", "recovered")
    return Grid(f"{metric.name.capitalize()} ({metric.heading}) by method at the same ratio", header, rows)


def generations_grid(report: Report) -> Grid:
    """What each variant wrote after each prompt."""
    labels = tuple(dict.fromkeys(label for one in report.generations for label in one.answers))
    rows = tuple((one.prompt, *(one.answers.get(label, text.ABSENT) for label in labels)) for one in report.generations)
    return Grid("Greedy continuations", ("prompt", *labels), rows, words=1 + len(labels))


def sites_grid(evidence: Sequence[SiteEvidence]) -> Grid:
    """One row per site: what was kept, the method's facts and the spectrum."""
    ordered = sorted(evidence, key=lambda one: one.site)
    facts = tuple(dict.fromkeys(name for one in ordered for name in one.scores.facts if name not in DEAD_FACTS))

    def row(one: SiteEvidence) -> tuple[str, ...]:
        width, spectrum = len(one.scores.keep_N), one.scores.spectrum
        values = [one.scores.facts.get(name) for name in facts]
        return (
            one.site.key,
            f"{width:,}",
            f"{len(one.kept):,}",
            text.percent(1 - len(one.kept) / width),
            f"{int(np.isneginf(one.scores.keep_N).sum()):,}",
            *(text.ABSENT if value is None else text.number(value) for value in values),
            text.number(float(spectrum.values_K[0])) if spectrum and len(spectrum.values_K) else text.ABSENT,
            text.number(spectrum.residual) if spectrum else text.ABSENT,
        )

    names = tuple(name.replace("_", " ") for name in facts)
    header = ("site", "width", "kept", "removed", "dead units", *names, "largest eigenvalue", "residual")
    return Grid("What was kept in each layer", header, tuple(row(one) for one in ordered))
