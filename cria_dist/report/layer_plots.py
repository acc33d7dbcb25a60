"""Plots with one mark per layer, drawn from the evidence of the sites in their order.

Shape suffixes: L layers, K eigenvalues.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from cria_dist.records import SiteEvidence
from cria_dist.report import ridges, text
from cria_dist.report.canvas import KEPT, REMOVED, canvas, plain_log_ticks


def kept_widths(evidence: Sequence[SiteEvidence]) -> Figure | None:
    """Kept and removed units of every site, stacked."""
    if not evidence:
        return None
    width_L = np.array([len(one.scores.keep_N) for one in evidence])
    kept_L = np.array([len(one.kept) for one in evidence])
    figure, axes = canvas(3.6)
    position_L = np.arange(len(evidence))
    axes.bar(position_L, kept_L, color=KEPT, width=0.8, label="kept")
    axes.bar(position_L, width_L - kept_L, bottom=kept_L, color=REMOVED, width=0.8, label="removed")
    share = 1 - kept_L.sum() / width_L.sum()
    units = "KV groups" if all(one.site.part == "attention" for one in evidence) else "Units"
    what = f"{text.percent(float(share))} of {width_L.sum():,} removed"
    axes.set_title(f"{units} kept in each layer ({what})")
    _layer_ticks(axes, evidence)
    axes.set(ylabel="units", xlim=(-0.6, len(evidence) - 0.4), ylim=(0, 1.04 * width_L.max()))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower right", ncols=2)
    return figure


def spectra(evidence: Sequence[SiteEvidence]) -> Figure | None:
    """Generalised eigenvalues of every site that has a spectrum."""
    shown = [(one, one.scores.spectrum.values_K) for one in evidence if one.scores.spectrum is not None]
    shown = [(one, values_K) for one, values_K in shown if (values_K > 0).any()]
    if not shown:
        return None
    figure, axes = canvas(4.8)
    colours = ScalarMappable(Normalize(0, max(len(evidence) - 1, 1)), "viridis")
    for one, values_K in shown:
        rank_K = np.arange(1, len(values_K) + 1) / len(one.scores.keep_N)
        positive_K = np.where(values_K > 0, values_K, np.nan)
        axes.plot(
            rank_K,
            positive_K,
            color=colours.cmap(evidence.index(one) / max(len(evidence) - 1, 1)),
            linewidth=1.1,
            alpha=0.85,
        )
    axes.set_yscale("log")
    axes.set_title("Spectrum of input graph against output graph, one line per layer")
    axes.set(xlabel="rank / number of units", ylabel="generalised eigenvalue")
    plain_log_ticks(axes, "y")
    bar = figure.colorbar(colours, ax=axes, label="layer", pad=0.01)
    bar.locator = MaxNLocator(8, integer=True)
    bar.formatter = FuncFormatter(lambda place, _: _name(evidence, round(place)))
    bar.update_ticks()
    return figure


def residuals(evidence: Sequence[SiteEvidence]) -> Figure | None:
    """Relative residual of the eigenpairs of every site that has a spectrum."""
    shown = [(place, one.scores.spectrum) for place, one in enumerate(evidence) if one.scores.spectrum is not None]
    if not shown:
        return None
    figure, axes = canvas(2.8)
    residual_L = np.array([max(spectrum.residual, np.finfo(np.float64).eps) for _, spectrum in shown])
    low, high = 10.0 ** (np.floor(np.log10(residual_L.min())) - 1), 10.0 ** np.ceil(np.log10(residual_L.max()))
    axes.vlines([place for place, _ in shown], low, residual_L, color=KEPT, alpha=0.35, linewidth=2)
    axes.plot([place for place, _ in shown], residual_L, "o", color=KEPT, markersize=5)
    axes.set_yscale("log")
    axes.set_title(f"Residual of the eigenpairs in each layer (largest {residual_L.max():.1e})")
    _layer_ticks(axes, evidence)
    axes.set(ylabel="relative residual", xlim=(-0.6, len(evidence) - 0.4), ylim=(low, high))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="x")
    return figure


def scores(evidence: Sequence[SiteEvidence]) -> Figure | None:
    """A ridge per site: how its scores are distributed and which of them were removed."""
    if not evidence:
        return None
    scale = ridges.common_scale([one.scores.keep_N for one in evidence])
    pitch = 0.24 if len(evidence) <= 48 else 0.17
    figure, axes = canvas(1.5 + pitch * len(evidence))
    edges = ridges.bin_edges(scale, [one.scores.keep_N for one in evidence])
    for row, one in enumerate(evidence):
        ridge = ridges.ridge(one, scale, edges)
        style = {"step": "post", "linewidth": 0}
        axes.fill_between(edges, row, row - ridge.removed_B, color=REMOVED, **style)
        axes.fill_between(edges, row - ridge.removed_B, row - ridge.total_B, color=KEPT, **style)
        if ridge.dead:
            axes.text(1.01, row, f"{ridge.dead}", transform=axes.get_yaxis_transform(), va="bottom", fontsize=7)
    if any(np.isneginf(one.scores.keep_N).any() for one in evidence):
        axes.text(1.01, 1.0, "dead", transform=axes.transAxes, fontsize=8, va="bottom", fontweight="bold")
    units = "KV groups" if all(one.site.part == "attention" for one in evidence) else "units"
    axes.set_title(f"Scores of the {units} in each layer, and where the cut falls", pad=18)
    axes.set(xlabel=scale.label, ylabel="layer", ylim=(len(evidence) - 0.2, -1.2), xlim=(edges[0], edges[-1]))
    _layer_ticks(axes, evidence, vertical=True)
    ticks = scale.ticks(edges[0], edges[-1])
    axes.set_xticks(list(ticks), labels=[text.number(value) for value in ticks.values()])
    axes.grid(visible=False, axis="y")
    handles = [Patch(color=REMOVED, label="removed"), Patch(color=KEPT, label="kept")]
    figure.legend(handles=handles, loc="outside lower right", ncols=2)
    return figure


def _name(evidence: Sequence[SiteEvidence], index: int) -> str:
    if not 0 <= index < len(evidence):
        return ""
    several = len({one.site.part for one in evidence}) > 1
    return evidence[index].site.key if several else str(evidence[index].site.layer)


def _layer_ticks(axes: Axes, evidence: Sequence[SiteEvidence], vertical: bool = False) -> None:
    places = range(0, len(evidence), 1 if len(evidence) <= 40 else 2 if len(evidence) <= 80 else 5)
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(list(places), labels=[_name(evidence, place) for place in places], fontsize=8)
    axis.set_tick_params(length=0)
    if not vertical:
        axes.set_xlabel("layer")
