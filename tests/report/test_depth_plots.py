"""The plot of a plan that removes whole layers."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from cria_dist.records import Report, Scores, Site, SiteEvidence
from cria_dist.report import plots
from cria_dist.report.canvas import REMOVED
from cria_dist.report.depth_plots import layers
from cria_dist.report.html import render


@pytest.fixture
def deep() -> list[SiteEvidence]:
    """Six layers, of which 2 and 4 go."""
    keep = [0.9, 0.5, 0.1, 0.4, 0.2, 0.8]
    sites = [Site(layer, "block") for layer in range(6)]
    scores = [Scores(site, np.array([keep[site.layer]]), np.array([100])) for site in sites]
    return [SiteEvidence(one.site, one, () if one.site.layer in (2, 4) else (0,)) for one in scores]


def test_the_bars_are_the_scores_and_the_removed_have_their_colour(deep: list[SiteEvidence]) -> None:
    figure = layers(deep)
    assert figure is not None
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.9, 0.5, 0.1, 0.4, 0.2, 0.8]
    assert [layer for layer, bar in enumerate(bars) if bar.get_facecolor() == to_rgba(REMOVED)] == [2, 4]
    assert "2 of 6 layers removed" in figure.axes[0].get_title()


def test_layers_take_the_place_of_widths_and_histograms(
    bare_report: Report, deep: list[SiteEvidence], tmp_path: Path
) -> None:
    drawn = plots.draw_all(bare_report, deep, tmp_path)
    assert {path.stem for path in drawn} == {"perplexity", "layers"}
    assert "layer-004.block" in render(bare_report, deep, drawn)


def test_neurons_have_no_such_plot(evidence: tuple[SiteEvidence, ...]) -> None:
    assert layers(evidence) is None
