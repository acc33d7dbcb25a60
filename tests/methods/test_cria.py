"""Cria against its definition, its pitfalls and its options."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import scipy.linalg
from pydantic import ValidationError
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata, spearmanr

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths import density, importance, pencil
from cria_dist.methods import Cria, SiteStatistics

OPTIONS = {
    "spectrum": ("top", "full"),
    "drop_edges": (0.0, 0.25),
    "output_weighting": ("none", "rank"),
    "neighbour_guard": (False, True),
    "dead_first": (False, True),
}


def neighbour_laplacian(signals_NM, k):
    """Unweighted union kNN Laplacian, from the definition."""
    wide = np.asarray(signals_NM, dtype=np.float64)
    adjacency = np.zeros((len(wide), len(wide)))
    for neuron, row in enumerate(wide):
        distance = np.linalg.norm(wide - row, axis=1)
        distance[neuron] = np.inf
        nearest = np.argsort(distance, kind="stable")[:k]
        adjacency[neuron, nearest] = adjacency[nearest, neuron] = 1
    assert connected_components(adjacency, directed=False)[0] == 1
    return np.diag(adjacency.sum(axis=1)) - adjacency


def definition(pre, post, k, pairs):
    """Node scores and eigenvalues from SPADE's formulas: grounded at the last neuron, no Cholesky of ours."""
    left, right = neighbour_laplacian(pre, k), neighbour_laplacian(post, k)
    size = len(left)
    basis = np.vstack([np.eye(size - 1), -np.ones(size - 1)])  # spans the complement of the constant vector
    values, coordinates = scipy.linalg.eigh(basis.T @ left @ basis, basis.T @ right @ basis)
    values, vectors = values[::-1][:pairs], (basis @ coordinates)[:, ::-1][:, :pairs]
    embedding = vectors * np.sqrt(values)
    scores = np.zeros(size)
    for neuron in range(size):
        friends = np.flatnonzero(left[neuron] == -1)
        scores[neuron] = np.mean([np.sum((embedding[neuron] - embedding[q]) ** 2) for q in friends])
    return scores, values


LINE_PRE = np.asarray([[0.0], [1.0], [2.5], [4.5]])
LINE_POST = np.asarray([[1.0], [0.0], [2.5], [4.5]])


def test_four_neurons_on_a_line_by_hand():
    # The input graph is the path 0-1-2-3, the output graph the path 1-0-2-3 (k = 1). The score of an input edge p, q is
    # the sum over input edges of the squared potential differences that a unit current from p to q makes in the output
    # graph. A current flows along the path and drops 1 per edge, so over the input edges 01, 12, 23 it drops by
    #   p, q = 0, 1: (1, 1, 0)     1, 2: (1, 2, 0)     2, 3: (0, 0, 1)
    verdict = Cria(neighbours=1, spectrum="full").score(SiteStatistics(4, LINE_PRE, LINE_POST))
    edge_scores = np.asarray([1.0 + 1.0, 1.0 + 4.0, 1.0])
    expected = [edge_scores[0], edge_scores[:2].mean(), edge_scores[1:].mean(), edge_scores[2]]
    np.testing.assert_allclose(verdict.keep_N, expected, rtol=1e-12)
    golden = (3 + np.sqrt(5)) / 2  # the block [[1, 1], [1, 2]] has eigenvalues golden and 1 / golden
    np.testing.assert_allclose(verdict.spectrum.values_K, [golden, 1, 1 / golden], rtol=1e-12)


@pytest.mark.parametrize(("neighbours", "pairs"), [(3, 1), (4, 5), (6, 29)])
def test_scores_follow_the_definition(neighbours, pairs, make_layer):
    [(pre, post)] = make_layer(30, 80, seed=2)
    expected, values = definition(pre, post, neighbours, pairs)
    verdict = Cria(neighbours=neighbours, eigenpairs=pairs).score(SiteStatistics(30, pre, post))
    np.testing.assert_allclose(verdict.keep_N, expected, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(verdict.spectrum.values_K[:pairs], values, rtol=1e-9)
    assert verdict.spectrum.residual < 1e-9


def test_full_spectrum_is_all_eigenpairs(make_statistics):
    statistics = make_statistics(width=80)
    full = Cria(spectrum="full").score(statistics)
    pairs = Cria(eigenpairs=79).score(statistics)
    np.testing.assert_allclose(full.keep_N, pairs.keep_N, rtol=1e-9)
    np.testing.assert_allclose(full.spectrum.values_K, pairs.spectrum.values_K, rtol=1e-9)
    expected, _ = definition(statistics.input_NM, statistics.output_NM, 10, 79)
    np.testing.assert_allclose(full.keep_N, expected, rtol=1e-7)
    assert full.spectrum.complete


def test_more_eigenpairs_than_exist_means_all(make_statistics):
    statistics = make_statistics(width=40)
    every = Cria(eigenpairs=10_000).score(statistics)
    np.testing.assert_array_equal(every.keep_N, Cria(eigenpairs=39).score(statistics).keep_N)


def test_equal_signals_score_the_effective_resistance(make_layer):
    [(pre, _)] = make_layer(50, 100, seed=0)
    verdict = Cria(spectrum="full", neighbours=5).score(SiteStatistics(50, pre, pre))
    laplacian = neighbour_laplacian(pre, 5)
    pseudo = np.linalg.pinv(laplacian, hermitian=True)
    resistance = np.diag(pseudo)[:, None] + np.diag(pseudo)[None, :] - 2 * pseudo
    adjacent = laplacian == -1
    np.testing.assert_allclose(verdict.keep_N, (resistance * adjacent).sum(axis=1) / adjacent.sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(verdict.spectrum.values_K, np.ones(49), rtol=1e-10)


@pytest.mark.parametrize("method", [Cria(), Cria(spectrum="full")], ids=repr)
def test_scores_follow_a_permutation_of_the_neurons(method, make_layer):
    [(pre, post)] = make_layer(120, 200, seed=4)
    order = np.random.default_rng(0).permutation(120)
    straight = method.score(SiteStatistics(120, pre, post)).keep_N
    shuffled = method.score(SiteStatistics(120, pre[order], post[order])).keep_N
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_scores_ignore_the_scale_of_the_signals(preset, make_statistics):
    statistics = make_statistics(width=100)
    scaled = replace(statistics, input_NM=statistics.input_NM * 2**10, output_NM=statistics.output_NM * 2**-12)
    method = Cria(preset=preset)
    np.testing.assert_array_equal(method.score(scaled).keep_N, method.score(statistics).keep_N)


def test_scores_ignore_the_order_of_the_tokens(make_layer):
    [(pre, post)] = make_layer(100, 300, seed=5)
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_allclose(
        Cria().score(SiteStatistics(100, pre[:, order], post[:, order])).keep_N,
        Cria().score(SiteStatistics(100, pre, post)).keep_N,
        rtol=1e-9,
    )


def test_split_halves_agree_on_the_ranking(make_layer):
    for seed in range(3):
        halves = make_layer(400, 4096, seed, batches=2)
        full, top = (
            spearmanr(*(method.score(SiteStatistics(400, pre, post)).keep_N for pre, post in halves)).statistic
            for method in (Cria(spectrum="full"), Cria())
        )
        assert full >= 0.8
        assert top < full  # why the recommended preset takes the whole spectrum


def test_paper_preset_has_every_option_off():
    paper = Cria()
    assert paper.preset == "paper"
    assert (paper.neighbours, paper.eigenpairs) == (10, 10)
    assert all(getattr(paper, name) == off for name, (off, _) in OPTIONS.items())
    assert Cria(preset="paper") == paper
    assert paper.needs == {"signals"}


def test_recommended_preset_changes_the_start_and_explicit_values_win():
    recommended = Cria(preset="recommended")
    assert (recommended.spectrum, recommended.output_weighting, recommended.dead_first) == ("full", "rank", True)
    assert recommended.needs == {"signals", "moments", "weights"}
    for name, (off, _) in OPTIONS.items():
        explicit = Cria(**{"preset": "recommended", name: off})
        assert getattr(explicit, name) == off
        others = set(OPTIONS) - {name}
        assert all(getattr(explicit, other) == getattr(recommended, other) for other in others)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_can_be_switched_on_one_by_one(name):
    on = Cria(**{name: OPTIONS[name][1]})
    assert {other for other in OPTIONS if getattr(on, other) != OPTIONS[other][0]} == {name}


@pytest.mark.parametrize(
    "wrong",
    [
        {"neighbours": 0},
        {"neighbours": 257},
        {"eigenpairs": 0},
        {"preset": "best"},
        {"preset": None},
        {"preset": ["paper"]},
        {"spectrum": "half"},
        {"drop_edges": 1.0},
        {"drop_edges": -0.1},
    ],
    ids=str,
)
def test_values_out_of_range_are_validation_errors(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Cria(**wrong)


DEAD = (3, 17, 40, 41, 63)


def test_dead_units_go_first_and_stay_out_of_the_graphs(make_statistics):
    statistics = make_statistics(dead=DEAD)
    verdict = Cria(dead_first=True, neighbour_guard=True).score(statistics)
    np.testing.assert_array_equal(np.flatnonzero(np.isneginf(verdict.keep_N)), DEAD)
    assert not np.isin(verdict.edges_E2, DEAD).any()
    assert verdict.facts["dead"] == 5
    np.testing.assert_array_equal(importance.lowest(verdict.keep_N, 5), DEAD)
    live = np.setdiff1d(np.arange(64), DEAD)
    alone = Cria(neighbour_guard=True).score(SiteStatistics(59, statistics.input_NM[live], statistics.output_NM[live]))
    np.testing.assert_array_equal(verdict.keep_N[live], alone.keep_N)
    np.testing.assert_array_equal(verdict.edges_E2, live[alone.edges_E2])


def test_dead_units_score_like_others_when_not_asked_for(make_statistics):
    verdict = Cria().score(make_statistics(dead=DEAD))
    assert np.isfinite(verdict.keep_N).all()
    assert verdict.facts["dead"] == 0


def test_dead_first_changes_nothing_without_dead_units(make_statistics):
    statistics = make_statistics()
    np.testing.assert_array_equal(Cria(dead_first=True).score(statistics).keep_N, Cria().score(statistics).keep_N)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 300.1, -4000.7])
def test_any_output_that_never_varies_is_dead(value, make_statistics):
    statistics = make_statistics()
    statistics.output_NM[7] = value
    verdict = Cria(dead_first=True).score(statistics)
    np.testing.assert_array_equal(np.flatnonzero(np.isneginf(verdict.keep_N)), [7])


def test_recommended_ranks_dead_units_first_whatever_their_weights(make_statistics):
    statistics = make_statistics(dead=DEAD)
    statistics.output_norm_N[list(DEAD)] = 1e6
    keep = Cria(preset="recommended").score(statistics).keep_N
    np.testing.assert_array_equal(importance.lowest(keep, 5), DEAD)


def test_too_few_live_neurons_name_value_and_remedy(make_statistics):
    statistics = make_statistics(width=20, dead=tuple(range(9)))
    with pytest.raises(NumericError) as caught:
        Cria(dead_first=True).score(statistics)
    message = str(caught.value)
    assert "11 of 20 neurons are alive" in message
    assert "method.neighbours=10 needs at least 12; lower method.neighbours" in message
    assert Cria(dead_first=True, neighbours=9).score(statistics).keep_N.shape == (20,)


@pytest.mark.parametrize("preset", ["paper", "recommended"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("signals", ["input_NM", "output_NM"])
def test_signals_that_are_not_finite_are_named_as_such(preset, bad, signals, make_statistics):
    statistics = make_statistics()
    getattr(statistics, signals)[5, 7] = bad
    with pytest.raises(NumericError, match="NaN or infinite"):
        Cria(preset=preset).score(statistics)


def test_product_weighting_multiplies_by_what_the_next_layer_reads(make_statistics):
    statistics = make_statistics()
    reading = statistics.output_NM.astype(np.float64).std(axis=1) * statistics.output_norm_N
    expected = Cria().score(statistics).keep_N * reading
    np.testing.assert_allclose(Cria(output_weighting="product").score(statistics).keep_N, expected, rtol=1e-9)


@pytest.mark.parametrize("dead", [(), DEAD])
def test_rank_weighting_averages_two_rankings(dead, make_statistics):
    statistics = make_statistics(dead=dead)
    live = np.setdiff1d(np.arange(64), dead)
    plain = Cria(dead_first=True).score(statistics).keep_N[live]
    reading = (statistics.output_NM.astype(np.float64).std(axis=1) * statistics.output_norm_N)[live]
    weighted = Cria(dead_first=True, output_weighting="rank").score(statistics).keep_N[live]
    np.testing.assert_allclose(weighted, (rankdata(plain) + rankdata(reading)) / (2 * live.size), rtol=1e-12)
    assert weighted.min() >= 1 / live.size
    assert weighted.max() <= 1
    assert weighted.mean() == pytest.approx((live.size + 1) / (2 * live.size))


def test_guard_edges_are_the_input_graph(make_statistics):
    statistics = make_statistics()
    verdict = Cria(neighbour_guard=True).score(statistics)
    laplacian = neighbour_laplacian(statistics.input_NM, 10)
    np.testing.assert_array_equal(verdict.edges_E2, np.argwhere(np.triu(laplacian) == -1))
    np.testing.assert_array_equal(verdict.keep_N, Cria().score(statistics).keep_N)
    assert Cria().score(statistics).edges_E2 is None


def test_guard_takes_no_two_neighbours_of_thirty_near_copies(make_layer):
    [(pre, post)] = make_layer(300, 1024, seed=6)
    noise = 0.01 * np.random.default_rng(0).normal(size=(30, 1024)).astype(np.float32)
    pre[:30] = pre[0] + noise
    post[:30] = np.maximum(pre[:30], 0)
    verdict = Cria(spectrum="full", neighbour_guard=True).score(SiteStatistics(300, pre, post))
    for count in (10, 30):
        guarded = importance.lowest_guarded(verdict.keep_N, count, verdict.edges_E2)
        unguarded = importance.lowest(verdict.keep_N, count)
        assert not any(np.isin(edge, guarded).all() for edge in verdict.edges_E2)
        assert any(np.isin(edge, unguarded).all() for edge in verdict.edges_E2)


def test_separate_groups_are_joined_and_counted():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.eye(3, 50) * 1000, 20, axis=0)
    pre = (groups + rng.normal(size=(60, 50))).astype(np.float32)
    post = np.maximum(rng.normal(size=(60, 50)), 0).astype(np.float32)
    verdict = Cria(neighbours=5).score(SiteStatistics(60, pre, post))
    assert verdict.facts["input_components"] == 3
    assert verdict.facts["output_components"] == 1
    swapped = Cria(neighbours=5).score(SiteStatistics(60, post, pre))
    assert swapped.facts["output_components"] == 3
    assert np.isfinite(swapped.keep_N).all()


def test_facts_describe_the_graphs(make_statistics):
    statistics = make_statistics()
    facts = Cria().score(statistics).facts
    for side, signals in (("input", statistics.input_NM), ("output", statistics.output_NM)):
        assert facts[f"{side}_max_degree"] == neighbour_laplacian(signals, 10).diagonal().max()
        assert facts[f"{side}_components"] == 1


def test_beyond_the_dense_limits_the_scores_are_the_same(monkeypatch, make_layer):
    [(pre, post)] = make_layer(600, 400, seed=7)
    statistics = SiteStatistics(600, pre, post)
    top, full = Cria().score(statistics), Cria(spectrum="full").score(statistics)
    monkeypatch.setattr(pencil, "DENSE_LIMIT", 100)
    monkeypatch.setattr(density, "EXACT_LIMIT", 100)
    iterative, sketched = Cria().score(statistics), Cria(spectrum="full").score(statistics)
    np.testing.assert_allclose(iterative.keep_N, top.keep_N, rtol=1e-4, atol=1e-8)
    assert spearmanr(iterative.keep_N, top.keep_N).statistic >= 0.999
    assert spearmanr(sketched.keep_N, full.keep_N).statistic >= 0.999
    for found in (iterative.spectrum, sketched.spectrum):
        assert not found.complete
        assert found.residual < pencil.RESIDUAL_TOLERANCE
        np.testing.assert_allclose(found.values_K[:10], full.spectrum.values_K[:10], rtol=1e-6)
        np.testing.assert_allclose(found.values_K, full.spectrum.values_K, atol=0.1)
    assert sketched.facts["spectral_gap"] == pytest.approx(full.facts["spectral_gap"], abs=1e-5)
    assert sketched.facts["effective_rank"] == pytest.approx(full.facts["effective_rank"], rel=0.01)


def test_dropped_edges_leave_connected_graphs_and_a_related_ranking(make_layer):
    [(pre, post)] = make_layer(400, 1024, seed=8)
    statistics = SiteStatistics(400, pre, post)
    every, sparse = (Cria(spectrum="full", neighbour_guard=True, drop_edges=share) for share in (0.0, 0.3))
    whole, thinned = every.score(statistics), sparse.score(statistics)
    assert len(thinned.edges_E2) == pytest.approx(0.7 * len(whole.edges_E2), abs=2)
    assert set(map(tuple, thinned.edges_E2.tolist())) < set(map(tuple, whole.edges_E2.tolist()))
    assert np.isfinite(thinned.keep_N).all()
    assert spearmanr(whole.keep_N, thinned.keep_N).statistic > 0.3


@pytest.mark.parametrize("rows", [(63, 64), (64, 63), (63, 63)])
def test_signals_of_other_shapes_name_the_counts(rows, make_statistics):
    statistics = make_statistics()
    cut = replace(statistics, input_NM=statistics.input_NM[: rows[0]], output_NM=statistics.output_NM[: rows[1]])
    with pytest.raises(NumericError, match=rf"{rows[0]} pre-activation and {rows[1]} post-activation signals of 64"):
        Cria().score(cut)


@pytest.mark.parametrize("preset", ["paper", "recommended"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant_site_is_an_error(preset, value, make_statistics):
    statistics = make_statistics()
    with pytest.raises(NumericError, match=r"all 64 neurons have the same signals|0 of 64 neurons are alive"):
        Cria(preset=preset).score(replace(statistics, output_NM=np.full_like(statistics.output_NM, value)))


@pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_scores_do_not_depend_on_the_library(library: Literal["numpy", "cupy"], preset, make_statistics):
    if library == "cupy" and arrays.choose()[0] != "cupy":
        pytest.skip(arrays.choose()[1])
    statistics = make_statistics(dead=DEAD)
    on_device = replace(
        statistics,
        input_NM=arrays.to_device(statistics.input_NM, library),
        output_NM=arrays.to_device(statistics.output_NM, library),
    )
    method = Cria(preset=preset)
    expected, found = method.score(statistics), method.score(on_device)
    assert isinstance(found.keep_N, np.ndarray)
    np.testing.assert_allclose(found.keep_N, expected.keep_N, rtol=1e-7)
    np.testing.assert_allclose(found.spectrum.values_K, expected.spectrum.values_K, rtol=1e-8)
    assert dict(found.facts) == pytest.approx(dict(expected.facts), rel=1e-7)
