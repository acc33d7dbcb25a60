"""The plots of a report: :func:`draw_all` writes those that have data as PNG, one function draws one figure."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cria_dist.records import Report, SiteEvidence
from cria_dist.report import text
from cria_dist.report.canvas import COLOURS, KEPT, STYLE, canvas, plain_log_ticks
from cria_dist.report.depth_plots import layers, units_leave
from cria_dist.report.grids import contenders, variant
from cria_dist.report.layer_plots import kept_widths, residuals, scores, spectra
from cria_dist.report.metrics import ACCURACY, PERPLEXITY, Metric, metric_of


def draw_all(report: Report, evidence: Sequence[SiteEvidence], folder: Path) -> tuple[Path, ...]:
    """Draw every plot that has data; one left from an earlier report without data now is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(evidence, key=lambda one: one.site)
    within = ordered if units_leave(ordered) else []
    drawn: list[Path] = []
    with mpl.rc_context(STYLE):
        figures = {
            **{one.name: quality(report) if one is metric_of(report) else None for one in (PERPLEXITY, ACCURACY)},
            "layers": layers(ordered),
            **_of_parts(within),
            "spectra": spectra(ordered),
            "residuals": residuals(ordered),
            "loss": loss(report.loss),
            "stages": stages(report),
        }
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path)
            drawn.append(path)
    return tuple(drawn)


def _of_parts(evidence: Sequence[SiteEvidence]) -> dict[str, Figure | None]:
    """Kept units and scores, neurons and groups of heads each on their own scale."""
    groups = [one for one in evidence if one.site.part == "attention"]
    others = [one for one in evidence if one.site.part != "attention"]
    return {
        "kept_widths": kept_widths(others),
        "scores": scores(others),
        "kept_widths_attention": kept_widths(groups),
        "scores_attention": scores(groups),
    }


def quality(report: Report) -> Figure | None:
    """Perplexity or accuracy of every variant, and of the compared methods beside them."""
    metric, dense = metric_of(report), variant(report, "dense")
    bars = [(group.name, state, metric.of(one)) for group in contenders(report) for state, one in group.states()]
    base = None if dense is None else metric.of(dense)
    if base is not None:
        bars.insert(0, ("dense model", "dense", base))
    finite = [value for _, _, value in bars if np.isfinite(value)]
    if not finite:
        return None
    figure, axes = canvas(1.3 + 0.32 * len(bars))
    logarithmic = metric is PERPLEXITY and max(finite) > 10 * min(finite)
    place, previous = 0.0, bars[0][0]
    ticks: dict[str, list[float]] = {}
    for name, state, value in bars:
        place += 1.0 if name == previous else 1.5
        previous = name
        length = value if np.isfinite(value) else min(finite)
        axes.barh(place, length, color=COLOURS[state] if np.isfinite(value) else "none", height=0.85)
        share = metric.beside(value, base)
        note = metric.show(value) + (f"  ({share})" if share != text.ABSENT else "")
        axes.annotate(note, (length, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        ticks.setdefault(name, []).append(place)
    axes.set_yticks([float(np.mean(places)) for places in ticks.values()], labels=list(ticks))
    axes.invert_yaxis()
    _quality_axis(axes, metric, finite, logarithmic)
    handles = [Patch(color=COLOURS[state], label=state) for state in COLOURS if any(state == bar[1] for bar in bars)]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
    return figure


def stages(report: Report) -> Figure | None:
    """Seconds of every stage."""
    if not report.stages:
        return None
    figure, axes = canvas(1.1 + 0.32 * len(report.stages))
    values = [one.seconds for one in report.stages]
    bars = axes.barh(range(len(values)), values, color=KEPT, height=0.75)
    axes.bar_label(bars, labels=[text.seconds(value) for value in values], padding=4, fontsize=9)
    axes.set_yticks(range(len(values)), labels=[one.stage for one in report.stages])
    axes.invert_yaxis()
    axes.set_title(f"Time per stage ({text.seconds(sum(values))} in all)")
    axes.set(xlabel="seconds", xlim=(0, max(*values, 1e-3) * 1.15))
    axes.grid(visible=False, axis="y")
    return figure


def loss(points: Sequence[tuple[int, float]]) -> Figure | None:
    """Training loss of the recovery, with a running mean where there are enough steps."""
    if not points:
        return None
    figure, axes = canvas(3.6)
    step_S = np.array([step for step, _ in points])
    loss_S = np.array([value for _, value in points])
    window = len(points) // 10
    axes.plot(step_S, loss_S, color=KEPT, alpha=0.35 if window > 1 else 1.0, linewidth=1.2, label="each step")
    if window > 1:
        mean = np.convolve(loss_S, np.full(window, 1 / window), mode="valid")
        axes.plot(step_S[window - 1 :], mean, color=KEPT, linewidth=2, label=f"mean of the last {window} points")
        axes.legend(loc="upper right")
    axes.set_title("Training loss of the recovery")
    axes.set(xlabel="optimiser step", ylabel="loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _quality_axis(axes: Axes, metric: Metric, finite: Sequence[float], logarithmic: bool) -> None:
    axes.set_title(f"{metric.name.capitalize()} on the {metric.data} ({metric.better})")
    axes.set_xlabel(f"{metric.name}, logarithmic axis" if logarithmic else metric.name)
    axes.grid(visible=False, axis="y")
    if logarithmic:
        low, high = min(finite) / 1.5, max(finite)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** 0.22)
        plain_log_ticks(axes, "x")
    else:
        axes.set_xlim(0, max(finite) * 1.2)
