"""The paths for many neurons against the dense ones: solver, eigenpairs, sketch, density, sparsification."""

import itertools

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.csgraph import connected_components
from scipy.stats import spearmanr

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths import density, graphs, importance, lanczos, lobpcg, neighbours, pencil, sketch, solve, sparsify


def edges_of(signals, k=8):
    return graphs.connect(signals, graphs.union_edges(neighbours.nearest_neighbours(signals, k)))[0]


def layer(size, seed=0, observations=200):
    rng = np.random.default_rng(seed)
    pre = rng.standard_t(5, size=(size, 20)) @ rng.standard_t(5, size=(20, observations))
    pre += rng.normal(size=pre.shape)
    return pre, np.maximum(pre - 0.5, 0)


def pair(size, seed=0):
    left_edges, right_edges = (edges_of(signals) for signals in layer(size, seed))
    return left_edges, right_edges, graphs.laplacian(left_edges, size), graphs.laplacian(right_edges, size)


def textbook(name, size=300):
    nodes = np.arange(size)
    return {
        "star": np.stack([np.zeros(size - 1, dtype=np.int64), nodes[1:]], axis=1),
        "cycle": np.concatenate([np.stack([nodes[:-1], nodes[1:]], axis=1), [[0, size - 1]]]),
        "complete": np.asarray(list(itertools.combinations(range(size), 2))),
    }[name]


SOLVERS = [lobpcg, lanczos]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda module: module.__name__.split(".")[-1])


@every_solver
@pytest.mark.parametrize("count", [1, 10, 24])
def test_both_iterations_find_the_dense_pairs(solver, count, library):
    left_edges, right_edges, left, right = pair(500)
    expected, _ = pencil._top_dense(left, right, count)
    on_device = (graphs.laplacian(arrays.to_device(edges, library), 500) for edges in (left_edges, right_edges))
    values, vectors = map(arrays.to_numpy, solver.top_eigenpairs(*on_device, count, 1e-8))
    np.testing.assert_allclose(values, expected, rtol=1e-10)
    np.testing.assert_allclose(vectors.T @ (right @ vectors), np.eye(count), atol=1e-8)
    np.testing.assert_allclose(vectors.sum(axis=0), 0, atol=1e-9)
    assert pencil.residual(left, right, values, vectors) < 1e-8


@every_solver
@pytest.mark.parametrize(
    ("left", "right"), [("star", "complete"), ("complete", "star"), ("cycle", "complete"), ("complete", "complete")]
)
def test_both_iterations_on_textbook_pairs_with_repeated_values(solver, left, right):
    left, right = (graphs.laplacian(textbook(name), 300) for name in (left, right))
    values, vectors = solver.top_eigenpairs(left, right, 10, 1e-8)
    np.testing.assert_allclose(values, pencil.all_eigenvalues(left, right)[:10], rtol=1e-8)
    np.testing.assert_allclose(vectors.T @ (right @ vectors), np.eye(10), atol=1e-8)


@every_solver
def test_both_iterations_on_components_joined_by_bridges(solver):
    rng = np.random.default_rng(0)
    centres = 100 * np.repeat(np.eye(4, 60), 100, axis=0)
    one = rng.normal(size=(100, 60))
    pre = centres + np.tile(one, (4, 1))  # four equal clouds: values come in fours
    left_edges, right_edges = edges_of(pre), edges_of(np.maximum(pre, 0))
    left, right = (graphs.laplacian(edges, 400) for edges in (left_edges, right_edges))
    values, vectors = solver.top_eigenpairs(left, right, 12, 1e-8)
    np.testing.assert_allclose(values, pencil.all_eigenvalues(left, right)[:12], rtol=1e-8)
    np.testing.assert_allclose(vectors.T @ (right @ vectors), np.eye(12), atol=1e-8)


@every_solver
def test_both_iterations_repeat_their_bytes(solver):
    _, _, left, right = pair(400)
    first, second = (solver.top_eigenpairs(left, right, 6, 1e-8) for _ in range(2))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(first, second, strict=True))


def test_lanczos_takes_over_where_lobpcg_fails(monkeypatch):
    _, _, left, right = pair(400)
    expected, _ = pencil._top_dense(left, right, 5)
    monkeypatch.setattr(pencil, "DENSE_LIMIT", 0)
    monkeypatch.setattr(lobpcg, "MAX_ITERATIONS", 2)
    values, _, worst = pencil.top_eigenpairs(left, right, 5)
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    assert worst <= pencil.RESIDUAL_TOLERANCE


def test_solutions_solve_and_have_no_mean(library):
    _, right_edges, _, right = pair(300)
    wanted = np.random.default_rng(0).normal(size=(300, 7))
    laplacian = graphs.laplacian(arrays.to_device(right_edges, library), 300)
    found = arrays.to_numpy(solve.solve_laplacian(laplacian, arrays.to_device(wanted, library), 1e-10))
    np.testing.assert_allclose(right @ found, wanted - wanted.mean(axis=0), atol=1e-8)
    np.testing.assert_allclose(found.sum(axis=0), 0, atol=1e-10)


def test_a_system_of_a_disconnected_graph_is_an_error():
    apart = graphs.laplacian(np.asarray([[0, 1], [1, 2], [3, 4], [4, 5]]), 6)
    with pytest.raises(NumericError, match="not connected"):
        solve.solve_laplacian(apart, np.arange(6.0)[:, None] ** 2, 1e-10)


def test_sketched_scores_rank_neurons_like_exact_ones(library):
    left_edges, right_edges, left, right = pair(800)
    exact = importance.mean_over_neighbours(pencil.full_distortion_of_edges(left, right, left_edges), left_edges, 800)
    edges, on_device = (arrays.to_device(one, library) for one in (left_edges, right_edges))
    ones = arrays.to_device(np.ones(len(left_edges)), library)
    scores = arrays.to_numpy(sketch.distortion_of_edges(edges, ones, graphs.laplacian(on_device, 800)))
    found = importance.mean_over_neighbours(scores, left_edges, 800)
    assert spearmanr(found, exact).statistic >= 0.998
    np.testing.assert_allclose(found, exact, rtol=0.1)


def test_sketched_resistances_follow_foster():
    edges, _, laplacian, _ = pair(300)
    resistance = sketch.distortion_of_edges(edges, np.ones(len(edges)), laplacian)
    assert resistance.sum() == pytest.approx(299, rel=0.01)


def test_quadrature_finds_the_distribution_of_the_eigenvalues(library):
    left_edges, right_edges, left, right = pair(600)
    exact = pencil.all_eigenvalues(left, right)
    edges = [arrays.to_device(one, library) for one in (left_edges, right_edges)]
    nodes, weights = density.quadrature(*(graphs.laplacian(one, 600) for one in edges), edges[1])
    assert weights.sum() == pytest.approx(599)
    assert (weights * nodes).sum() == pytest.approx(exact.sum(), rel=0.02)
    assert (weights * nodes**2).sum() == pytest.approx((exact**2).sum(), rel=0.03)
    assert nodes.max() == pytest.approx(exact[0], rel=1e-3)
    assert nodes.min() > exact[-1] * 0.99


def test_quadrature_of_equal_graphs_is_one():
    edges, _, laplacian, _ = pair(200)
    nodes, weights = density.quadrature(laplacian, laplacian, edges)
    assert (weights * np.abs(nodes - 1)).sum() < 1e-6 * 199


def test_estimated_spectrum_is_near_the_exact_one(monkeypatch):
    _, right_edges, left, right = pair(600)
    exact, is_exact = density.whole_spectrum(left, right, right_edges)
    monkeypatch.setattr(density, "EXACT_LIMIT", 0)
    found, found_exact = density.whole_spectrum(left, right, right_edges)
    assert (is_exact, found_exact) == (True, False)
    assert found.shape == exact.shape == (599,)
    assert (np.diff(found) <= 0).all()
    assert np.abs(found - exact).mean() < 0.03 * exact[0]
    assert density.effective_rank(found) == pytest.approx(density.effective_rank(exact), rel=0.01)
    better = density.with_top(found, exact[:5])
    np.testing.assert_array_equal(better[:5], exact[:5])
    assert (np.diff(better) <= 0).all()


def test_effective_rank_and_gap_by_hand():
    assert density.effective_rank(np.ones(7)) == pytest.approx(7)
    assert density.effective_rank(np.asarray([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert density.effective_rank(np.asarray([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    assert density.spectral_gap(np.asarray([4.0, 3.0, 1.0])) == pytest.approx(0.25)
    assert density.spectral_gap(np.asarray([4.0])) == 0


def test_edge_distortion_is_the_leverage_of_the_weighted_edges():
    signals, _ = layer(150)
    edges = edges_of(signals)
    squared = ((signals[edges[:, 0]] - signals[edges[:, 1]]) ** 2).sum(axis=1)
    laplacian = graphs.laplacian(edges, 150, 1 / squared).toarray()
    pseudo = np.linalg.pinv(laplacian, hermitian=True)
    left, right = edges.T
    exact = (pseudo[left, left] + pseudo[right, right] - 2 * pseudo[left, right]) / squared
    assert exact.sum() == pytest.approx(149)
    assert spearmanr(sparsify.edge_distortion(signals, edges), exact).statistic > 0.98


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_sparsification_drops_the_share_but_never_the_connection(share):
    signals, _ = layer(150)
    edges = edges_of(signals)
    kept = sparsify.sparsify(signals, edges, share)
    assert set(map(tuple, kept.tolist())) <= set(map(tuple, edges.tolist()))
    assert connected_components(graphs.adjacency(kept, 150), directed=False)[0] == 1
    assert len(kept) == pytest.approx(max(149, (1 - share) * len(edges)), rel=0.1)


def test_sparsification_survives_duplicates():
    signals, _ = layer(120)
    signals[:15] = signals[0]
    kept = sparsify.sparsify(signals, edges_of(signals), 0.3)
    assert connected_components(graphs.adjacency(kept, 120), directed=False)[0] == 1


def test_sparsification_survives_more_copies_than_others():
    """Most edges then join equal signals, at no distance."""
    signals, _ = layer(90)
    signals[:70] = signals[0]
    edges = edges_of(signals)
    assert np.isfinite(sparsify.edge_distortion(signals, edges)).all()
    kept = sparsify.sparsify(signals, edges, 0.3)
    assert len(kept) < len(edges)
    assert connected_components(graphs.adjacency(kept, 90), directed=False)[0] == 1


def test_all_zero_rows_and_fewer_tokens_than_neurons():
    signals, _ = layer(200, observations=12)
    signals[[4, 90, 150]] = 0
    edges = edges_of(signals)
    assert graphs.degrees(edges, 200).min() >= 8
    assert connected_components(graphs.adjacency(edges, 200), directed=False)[0] == 1
    assert {(4, 90), (4, 150), (90, 150)} <= set(map(tuple, edges.tolist()))


def test_spanning_tree_is_that_of_scipy(library):
    rng = np.random.default_rng(0)
    edges = edges_of(layer(60)[0])
    weights = 1 + rng.random(len(edges))
    found = arrays.smallest_spanning_tree(*(arrays.to_device(one, library) for one in (weights, edges)), 60)
    tree = scipy.sparse.csgraph.minimum_spanning_tree(scipy.sparse.csr_matrix((weights, edges.T), shape=(60, 60)))
    assert weights[arrays.to_numpy(found)].sum() == pytest.approx(tree.sum())
    assert arrays.to_numpy(found).sum() == 59


def test_float32_signals_give_the_pairs_of_float64_ones():
    pre, post = layer(300)
    for_single, for_double = (
        [graphs.laplacian(edges_of(signals.astype(np.float32).astype(dtype)), 300) for signals in (pre, post)]
        for dtype in (np.float32, np.float64)
    )
    np.testing.assert_array_equal(pencil.all_eigenvalues(*for_single), pencil.all_eigenvalues(*for_double))
