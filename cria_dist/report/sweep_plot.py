"""The plot of a sweep: what models cost against how good they are, one panel per cost.

Shape suffixes: P points of (cost, loss).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cria_dist.report.canvas import COLOURS, STYLE, WIDTH, plain_log_ticks


@dataclass(frozen=True, slots=True)
class Cloud:
    """All trials in one state of their models.

    Attributes:
        state: "before" or "after" recovery.
        points_P2: cost and loss of each trial; those that are not finite are not drawn.
        front_P: which of them are on the Pareto front.
    """

    state: str
    points_P2: NDArray[np.float64]
    front_P: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Panel:
    """One cost against the loss.

    Attributes:
        cost: name of the cost with its unit; more may follow on lines below.
        loss: name of the loss.
        dense: cost and loss of the dense model.
        clouds: the trials.
    """

    cost: str
    loss: str
    dense: tuple[float, float]
    clouds: tuple[Cloud, ...]


LOOKS = {"before": (COLOURS["repaired"], "before recovery"), "after": (COLOURS["recovered"], "after")}


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the plot as PNG, two panels in a line."""
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2 * lines), layout="constrained")
        for number, panel in enumerate(panels, 1):
            _draw(figure.add_subplot(lines, columns, number), panel)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=3)
        figure.savefig(path)


def _draw(axes: Axes, panel: Panel) -> None:
    """Every trial as a point, the front of each state as a line, the dense model beside them."""
    axes.plot(*panel.dense, "D", color=COLOURS["dense"], label="dense")
    shown = [panel.dense[1]]
    for cloud in panel.clouds:
        colour, name = LOOKS[cloud.state]
        points_P2 = cloud.points_P2[np.isfinite(cloud.points_P2).all(axis=1)]
        front_P2 = cloud.points_P2[cloud.front_P]
        axes.plot(*points_P2.T, "o", color=colour, alpha=0.5, markersize=5, label=name)
        axes.plot(*front_P2[np.argsort(front_P2[:, 0])].T, "o-", color=colour, linewidth=1.5, markersize=6)
        shown += points_P2[:, 1].tolist()
    name_only = panel.cost.partition(" (")[0]
    axes.set(xlabel=panel.cost, ylabel=panel.loss, title=f"{panel.loss.capitalize()} against {name_only}")
    if min(shown) > 0 and max(shown) > 10 * min(shown):
        axes.set_yscale("log")
        plain_log_ticks(axes, "y")
