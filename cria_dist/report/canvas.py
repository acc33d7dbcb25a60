"""What all plots share: colours, fonts, an empty figure, readable logarithmic axes."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

KEPT = "#0072b2"
REMOVED = "#e69f00"
COLOURS = {"dense": "#7f7f7f", "pruned": REMOVED, "repaired": KEPT, "recovered": "#009e73"}
"""Okabe-Ito colours: told apart with every common form of colour blindness."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,
}
WIDTH = 9.0


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the common width, height in inches, drawn without a window system."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def plain_log_ticks(axes: Axes, which: str) -> None:
    """Label a logarithmic axis with plain numbers: 1, 2 and 5 per decade where there is room."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low) if low > 0 else 1.0
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 4 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
