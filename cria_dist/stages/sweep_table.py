"""What a sweep found: which trials no other beats in size and quality, and the best of each budget."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cria_dist.config.sweep import ALIKE
from cria_dist.maths import pareto
from cria_dist.methods import METHODS
from cria_dist.records import Evaluation, Report
from cria_dist.report import grids, text
from cria_dist.report.grids import Grid

SWEEP_SCHEMA = 1
State = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Row:
    """One trial.

    Attributes:
        label: what sets it apart.
        command: the command that does the same by itself.
        checkpoint: folder of the model that is handed over.
        budget: what was to be removed, in words.
        dense: the model it started from.
        before: pruned, and repaired if it was; what recovery started from.
        after: the model that is handed over; ``before`` where there was no recovery.
        stopped: what became of a recovery that was stopped early; then ``before`` is all there is.
        terms: of what model it was made and what it was scored on, ``key=value`` each; losses compare only where all
            of them agree.
    """

    label: str
    command: str
    checkpoint: Path
    budget: str
    dense: Evaluation
    before: Evaluation
    after: Evaluation
    stopped: str | None = None
    terms: tuple[str, ...] = ()

    def at(self, state: State) -> Evaluation:
        """The model before or after recovery."""
        return self.before if state == "before" else self.after

    def loss(self, state: State) -> float:
        """Its loss; not a number after a recovery that was stopped."""
        return float("nan") if self.stopped and state == "after" else loss(self.at(state))


def row(label: str, command: str, folder: Path, report: Report, stopped: str | None = None) -> Row:
    """The line of a run with a report in a sweep, whose recovery may have been stopped."""
    dense, end = grids.variant(report, "dense"), grids.final(report)
    before = grids.variant(report, "repaired") or grids.variant(report, "pruned")
    if dense is None or end is None or before is None:
        raise TypeError("a report of a whole run has a dense and a pruned model")
    checkpoint = folder / ("recovered" if end.label == "recovered" else "pruned")
    return Row(label, command, checkpoint, _budget(report.config), dense, before, end, stopped, _terms(report.config))


def _budget(config: Mapping[str, Any]) -> str:
    """What trials must have in common for the best of them to be the one that loses least.

    A share of the units is no size by itself: a fifth of the neurons is more than a fifth of the heads.
    """
    prune, name = config["prune"], config["method"]["name"]
    unit = next(one.unit for one in METHODS if one.model_fields["name"].default == name)
    kinds = [unit] if unit != "mlp" else prune["units"]
    of = f" ({', '.join(kinds)})" if prune["budget"] == "units" and kinds != ["mlp"] else ""
    if prune["budget"] == "latency":
        of = f" ({prune['latency']})"
    return f"{100 * prune['ratio']:.6g} % of {prune['budget']}{of}"


def _terms(config: Mapping[str, Any]) -> tuple[str, ...]:
    terms: list[str] = []
    for key in ALIKE:
        if not key.startswith("prune."):  # those are the budget
            terms += _leaves(key, functools.reduce(operator.getitem, key.split("."), config))
    return tuple(terms)


def _leaves(key: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [leaf for name, one in value.items() for leaf in _leaves(f"{key}.{name}", one)]
    return [f"{key}={value}"]


def alike(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The trials whose losses compare, by those of their terms that not all of the rows have in common."""
    common = set[str].intersection(*(set(one.terms) for one in rows)) if rows else set[str]()
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in rows:
        groups.setdefault(tuple(term for term in one.terms if term not in common), []).append(one)
    return groups


def contests(rows: Sequence[Row]) -> dict[Row, str]:
    """What every trial competes in, in words: its budget, with the terms that not all have in common."""
    return {one: ", ".join([one.budget, *terms]) for terms, group in alike(rows).items() for one in group}


def loss(one: Evaluation) -> float:
    """What a sweep wants small: perplexity, or the share of wrong labels of a classifier."""
    return one.perplexity if one.accuracy is None else 1 - one.accuracy


def latency(one: Evaluation) -> float | None:
    """Time per generated token; of a forward pass where nothing is generated."""
    return one.prefill_ms if one.decode_ms is None else one.decode_ms


def front(rows: Sequence[Row], state: State) -> tuple[bool, ...]:
    """Which trials have no other of the same terms that is at least as small and as good, and better in one of both."""
    found: dict[Row, bool] = {}
    for group in alike(rows).values():
        points = [(one.at(state).parameters, one.loss(state)) for one in group]
        found |= zip(group, map(bool, pareto.front(np.array(points, dtype=np.float64))), strict=True)
    return tuple(found[one] for one in rows)


def best(rows: Sequence[Row]) -> dict[str, Row]:
    """The trial with the least loss of each contest; those whose loss is not a number, or were stopped, have none."""
    found: dict[str, Row] = {}
    for one, contest in contests(rows).items():
        there = found.get(contest)
        if np.isfinite(one.loss("after")) and (there is None or one.loss("after") < there.loss("after")):
            found[contest] = one
    return found


def grid(rows: Sequence[Row]) -> Grid:
    """The table: the smallest models last."""
    fronts = {state: dict(zip(rows, front(rows, state), strict=True)) for state in ("before", "after")}
    ordered = sorted(rows, key=lambda one: (-one.after.parameters, loss(one.after)))
    champions = best(rows).values()

    def line(one: Row) -> tuple[str, ...]:
        return (
            one.label + (" *" if one in champions else ""),
            text.count(one.after.parameters),
            text.percent(1 - one.after.parameters / one.dense.parameters),
            _quality(one.before, one.dense) + (" P" if fronts["before"][one] else ""),
            one.stopped or _quality(one.after, one.dense) + (" P" if fronts["after"][one] else ""),
            text.milliseconds(one.after.prefill_ms),
            text.milliseconds(one.after.decode_ms),
        )

    header = ("trial", "parameters", "removed", "before recovery", "after", "prefill (ms)", "decode (ms/token)")
    title = f"Trials: {quality_name(rows)} (x dense); P: on the Pareto front, *: best of its budget"
    return Grid(title, header, tuple(line(one) for one in ordered))


def record(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything as plain data, in the order of the trials."""
    fronts = {state: front(rows, state) for state in ("before", "after")}
    champions, contest = best(rows).values(), contests(rows)
    return {
        "schema": SWEEP_SCHEMA,
        "trials": [
            {
                **_facts(one),
                "budget": contest[one],
                "front_before": fronts["before"][index],
                "front_after": fronts["after"][index],
                "best_of_budget": one in champions,
            }
            for index, one in enumerate(rows)
        ],
    }


def _facts(one: Row) -> dict[str, Any]:
    unsaid = {"terms"} if one.stopped else {"terms", "stopped"}
    return {name: _plain(value) for name, value in asdict(one).items() if name not in unsaid}


def quality_name(rows: Sequence[Row]) -> str:
    """What the trials are judged by, for the reader."""
    return "perplexity" if all(one.after.accuracy is None for one in rows) else "accuracy"


def _plain(value: Any) -> Any:
    """Data that JSON can say: paths as text, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _quality(one: Evaluation, dense: Evaluation) -> str:
    if one.accuracy is not None:
        return text.percent(one.accuracy)
    return f"{text.perplexity(one.perplexity)} ({text.times(one.perplexity, dense.perplexity)})"
