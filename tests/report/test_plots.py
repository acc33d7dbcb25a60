"""The pictures: which are made, that they are pictures, and what is in them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from cria_dist.errors import DataError
from cria_dist.records import Report, Scores, Site, SiteEvidence
from cria_dist.report import layer_plots, plots, ridges

ALL = {"perplexity", "kept_widths", "scores", "spectra", "residuals", "loss", "stages"}


def site(keep: Sequence[float], kept: Sequence[int], layer: int = 0) -> SiteEvidence:
    keep_N = np.array(keep, dtype=np.float64)
    scores = Scores(Site(layer), keep_N, np.ones(len(keep_N), dtype=np.int64))
    return SiteEvidence(Site(layer), scores, tuple(kept))


def test_every_plot_is_a_picture_of_sensible_size(
    report: Report, evidence: tuple[SiteEvidence, ...], tmp_path: Path
) -> None:
    drawn = plots.draw_all(report, evidence, tmp_path / "plots")
    assert {path.stem for path in drawn} == ALL
    for path in drawn:
        picture = imread(path)
        height, width = picture.shape[:2]
        assert 900 <= width <= 1600, path
        assert 250 <= height <= 1600, path
        assert picture[..., :3].std() > 0.05, path


def test_plots_without_data_are_not_made_and_old_ones_removed(bare_report: Report, tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"old")
    drawn = plots.draw_all(bare_report, [site([1.0, 2.0], [1])], tmp_path)
    assert {path.stem for path in drawn} == {"perplexity", "kept_widths", "scores"}
    assert {path.stem for path in tmp_path.iterdir()} == {"perplexity", "kept_widths", "scores"}


def test_text_with_dollars_is_no_formula(report: Report, tmp_path: Path) -> None:
    comparison = tuple(replace(one, label=r"a$\frac$b") for one in report.comparison)
    assert plots.draw_all(replace(report, comparison=comparison), (), tmp_path)


@pytest.mark.parametrize(("worst", "scale"), [(150.0, "linear"), (250.0, "log")])
def test_perplexity_axis_is_logarithmic_beyond_a_factor_of_ten(bare_report: Report, worst: float, scale: str) -> None:
    variants = (bare_report.variants[0], replace(bare_report.variants[1], perplexity=worst))
    figure = plots.quality(replace(bare_report, variants=variants))
    assert figure is not None
    assert figure.axes[0].get_xscale() == scale
    assert f"{worst:.2f}" in " ".join(label.get_text() for label in figure.axes[0].texts)


def test_groups_of_heads_have_plots_of_their_own(
    report: Report, evidence: tuple[SiteEvidence, ...], tmp_path: Path
) -> None:
    groups = tuple(replace(one, site=replace(one.site, part="attention")) for one in evidence)
    drawn = {path.stem for path in plots.draw_all(report, (*evidence, *groups), tmp_path)}
    assert drawn == ALL | {"kept_widths_attention", "scores_attention"}
    figure = layer_plots.kept_widths(groups)
    assert figure is not None
    assert figure.axes[0].get_title().startswith("KV groups kept in each layer")


def test_kept_widths_are_the_bars(evidence: tuple[SiteEvidence, ...]) -> None:
    figure = layer_plots.kept_widths(evidence)
    assert figure is not None
    heights = [round(bar.get_height()) for bar in figure.axes[0].containers[0]]
    assert heights == [len(one.kept) for one in evidence]


def test_residuals_are_one_mark_per_layer_at_their_value(evidence: tuple[SiteEvidence, ...]) -> None:
    figure = layer_plots.residuals(evidence)
    assert figure is not None
    marks = figure.axes[0].lines[0].get_xydata()
    expected = [one.scores.spectrum.residual for one in evidence if one.scores.spectrum is not None]
    assert np.allclose(np.asarray(marks)[:, 1], expected)
    assert f"{max(expected):.1e}" in figure.axes[0].get_title()
    assert layer_plots.residuals([site([1.0, 2.0], [1])]) is None


def test_spectra_have_one_line_per_layer(evidence: tuple[SiteEvidence, ...]) -> None:
    figure = layer_plots.spectra(evidence)
    assert figure is not None
    assert len(figure.axes[0].lines) == len(evidence)
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param([-np.inf] * 4, id="all dead"),
        pytest.param([0.0] * 4, id="all zero"),
        pytest.param([2.5] * 4, id="constant"),
        pytest.param([-3.0, -1.0, 0.0, 1e9], id="negative and huge"),
        pytest.param([0.0, 1e-12, 1.0, 1e12], id="many decades"),
        pytest.param([np.nan, -np.inf, 0.0, 1.0], id="not numbers"),
    ],
)
def test_ridges_count_every_finite_score_once(keep: list[float]) -> None:
    one = site(keep, [2, 3])
    scale = ridges.common_scale([one.scores.keep_N])
    edges = ridges.bin_edges(scale, [one.scores.keep_N])
    ridge = ridges.ridge(one, scale, edges)
    finite_N = np.isfinite(one.scores.keep_N)
    assert np.all(np.diff(edges) > 0)
    assert ridge.dead == np.isneginf(one.scores.keep_N).sum()
    if finite_N.any():
        assert ridge.total_B.max() == pytest.approx(ridges.RIDGE_HEIGHT)
        share = ridge.removed_B.sum() / ridge.total_B.sum()
        assert share == pytest.approx(finite_N[:2].sum() / finite_N.sum())
    assert layer_plots.scores([one]) is not None


def test_scale_is_logarithmic_for_positive_scores_over_decades_only() -> None:
    rng = np.random.default_rng(0)
    assert ridges.common_scale([rng.lognormal(0, 2, 500)]).logarithmic
    assert not ridges.common_scale([rng.lognormal(0, 0.3, 500)]).logarithmic
    assert not ridges.common_scale([rng.normal(0, 1, 500)]).logarithmic


@pytest.mark.parametrize("logarithmic", [True, False])
def test_ticks_stand_where_their_value_is_drawn(logarithmic: bool) -> None:
    scale = ridges.Scale(logarithmic, "")
    ticks = scale.ticks(-2.5, 2.5)
    assert len(ticks) >= 4
    values = np.array([-1.0, 1.0, 0.1, 10.0]) if not logarithmic else np.array([0.01, 100.0, 1.0, 1.0])
    places = scale.place(values)
    for place, value in zip(places, values, strict=True):
        median = float(np.median(np.abs(values)))
        expected = np.log10(value / median) if logarithmic else np.arcsinh(value / median)
        assert place == pytest.approx(expected)
    for place, value in ticks.items():
        assert place == pytest.approx(np.log10(value) if logarithmic else np.arcsinh(value))


def test_kept_units_outside_the_scores_are_refused() -> None:
    with pytest.raises(DataError, match=r"layer-000\.mlp.*2 scores"):
        layer_plots.scores([site([1.0, 2.0], [0, 2])])
