"""Writes what a sweep found: ``sweep.json``, ``pareto.png``, and ``best/``, a link per budget."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cria_dist import files
from cria_dist.maths import pareto
from cria_dist.records import Evaluation
from cria_dist.report.sweep_plot import Cloud, Panel, draw
from cria_dist.stages.sweep_table import Row, State, alike, best, latency, loss, quality_name, record

TERM = 48
"""Characters of a term that find a place under a plot: the last ones, which tell paths apart."""
Cost = Callable[[Evaluation], float]


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write all three; links to checkpoints are relative, so that a folder of runs can be moved as a whole."""
    if not rows:
        return
    files.write_json(folder / "sweep.json", record(rows))
    draw(panels(rows), folder / "pareto.png")
    links = folder / "best"
    links.mkdir(exist_ok=True)
    for old in links.iterdir():
        if old.is_symlink():
            old.unlink()
    for contest, one in best(rows).items():
        (links / _name(contest, one)).symlink_to(os.path.relpath(one.checkpoint, links))


def _name(contest: str, one: Row) -> str:
    """Of the link: a digest tells apart what is too long for a name, or differs in other signs only."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", contest)
    return plain if contest == one.budget else f"{plain[:100]}-{files.digest(contest)[:8]}"


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Size against loss, of trials whose losses compare; and latency, where all were timed (what is handed over is)."""
    found: list[Panel] = []
    is_timed = all(latency(one.after) is not None and latency(one.dense) is not None for one in rows)
    for terms, group in alike(rows).items():
        below = "".join(f"\n{term if len(term) <= TERM else f'...{term[-TERM:]}'}" for term in terms)
        size, time = f"parameters (millions){below}", f"latency (ms){below}"
        found.append(_panel(group, size, lambda one: one.parameters / 1e6, ("before", "after")))
        if is_timed:
            found.append(_panel(group, time, lambda one: latency(one) or np.nan, ("after",)))
    return found


def _panel(rows: Sequence[Row], name: str, cost: Cost, states: Sequence[State]) -> Panel:
    clouds: list[Cloud] = []
    for state in states:
        points_P2 = np.array([(cost(one.at(state)), one.loss(state)) for one in rows], dtype=np.float64)
        clouds.append(Cloud(state, points_P2, pareto.front(points_P2)))
    dense = rows[0].dense
    label = "perplexity" if quality_name(rows) == "perplexity" else "share of wrong labels"
    return Panel(name, label, (cost(dense), loss(dense)), tuple(clouds))
