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
from cria_dist.stages.sweep_table import Row, State, best, latency, loss, quality_name, record

Cost = Callable[[Evaluation], float]


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write all three; links to checkpoints are relative, so that a folder of runs can be moved as a whole."""
    if not rows:
        return
    files.write_json(folder / "sweep.json", record(rows))
    draw(panels(rows), folder / "pareto.png")
    for budget, one in best(rows).items():
        link = folder / "best" / re.sub(r"[^A-Za-z0-9.]+", "-", budget)
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(one.checkpoint, link.parent))


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Size against loss; and latency, where all trials were timed (only what is handed over is)."""
    found = [_panel(rows, "parameters (millions)", lambda one: one.parameters / 1e6, ("before", "after"))]
    if all(latency(one.after) is not None and latency(one.dense) is not None for one in rows):
        found.append(_panel(rows, "latency (ms)", lambda one: latency(one) or np.nan, ("after",)))
    return found


def _panel(rows: Sequence[Row], name: str, cost: Cost, states: Sequence[State]) -> Panel:
    clouds: list[Cloud] = []
    for state in states:
        points_P2 = np.array([(cost(one.at(state)), one.loss(state)) for one in rows], dtype=np.float64)
        clouds.append(Cloud(state, points_P2, pareto.front(points_P2)))
    dense = rows[0].dense
    label = "perplexity" if quality_name(rows) == "perplexity" else "share of wrong labels"
    return Panel(name, label, (cost(dense), loss(dense)), tuple(clouds))
