"""What needs no sparse matrix runs on the array API alone; Laplacians are dense arrays here."""

import array_api_strict as strict
import numpy as np
import pytest

from cria_dist import arrays
from cria_dist.maths import (
    density,
    duplicates,
    elimination,
    graphs,
    importance,
    lanczos,
    lobpcg,
    neighbours,
    pencil,
    repair,
    sketch,
    solve,
)
from cria_dist.maths.points import Points


def host(found):
    """The result on the host; it must come in the library that was given."""
    assert type(found).__module__.startswith("array_api_strict")
    return np.from_dlpack(found)


def edges_of(signals, k=6):
    return graphs.connect(signals, graphs.union_edges(neighbours.nearest_neighbours(signals, k)))[0]


@pytest.fixture(scope="module")
def pair():
    """Edges of the input graph and both Laplacians, dense NumPy."""
    pre = np.random.default_rng(7).standard_t(4, size=(160, 40))
    edges = edges_of(pre)
    return edges, *(graphs.laplacian(one, 160).toarray() for one in (edges, edges_of(np.maximum(pre - 0.3, 0))))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbours(dtype, copies):
    signals = np.repeat(np.random.default_rng(0).standard_t(3, size=(90, 20)), copies, axis=0).astype(dtype)
    found = neighbours.nearest_neighbours(strict.asarray(signals), 6)
    np.testing.assert_array_equal(host(found), neighbours.nearest_neighbours(signals, 6))


def test_neighbours_in_many_tiles(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 40)
    monkeypatch.setattr(neighbours, "BLOCK_COLUMNS", 50)
    signals = np.random.default_rng(4).standard_t(3, size=(150, 30)).astype(np.float32)
    found = neighbours.nearest_neighbours(strict.asarray(signals), 6)
    np.testing.assert_array_equal(host(found), neighbours.nearest_neighbours(signals, 6))


def test_near_duplicates():
    rng = np.random.default_rng(1)
    signals = np.repeat(rng.normal(size=(4, 64)), 40, axis=0) + 1e-6 * rng.normal(size=(160, 64))
    signals = signals.astype(np.float32)  # more near-duplicates than a pool holds
    found = neighbours.nearest_neighbours(strict.asarray(signals), 5)
    np.testing.assert_array_equal(host(found), neighbours.nearest_neighbours(signals, 5))


def test_points():
    signals = np.random.default_rng(5).normal(size=(30, 12))
    points, expected = Points.of(strict.asarray(signals)), Points.of(signals)
    one, other = np.arange(10), np.arange(20, 30)
    np.testing.assert_allclose(host(points.exact(*map(strict.asarray, (one, other)))), expected.exact(one, other))
    np.testing.assert_allclose(host(points.tile(slice(0, 8), slice(4, 30))), expected.tile(slice(0, 8), slice(4, 30)))
    squared = points.squared_distances(strict.asarray(one))
    np.testing.assert_allclose(host(squared), expected.squared_distances(one))
    assert (host(points.error(squared, strict.asarray(one))) >= np.abs(squared_error(signals, host(squared)))).all()


def squared_error(signals, squared_BN):
    return squared_BN - ((signals[:10, None, :] - signals[None, :, :]) ** 2).sum(axis=2)


def test_distinct_rows():
    rows = np.random.default_rng(6).integers(0, 3, size=(40, 3)).astype(np.float64)
    keys = rows.sum(axis=1)  # unequal rows with equal keys
    found = duplicates.distinct_rows(*map(strict.asarray, (rows, keys)))
    for one, other in zip(found, duplicates.distinct_rows(rows, keys), strict=True):
        np.testing.assert_array_equal(host(one), other)


def test_edges_and_node_scores():
    nearest = neighbours.nearest_neighbours(np.random.default_rng(2).normal(size=(50, 8)), 4)
    edges = graphs.union_edges(strict.asarray(nearest))
    np.testing.assert_array_equal(host(edges), graphs.union_edges(nearest))
    np.testing.assert_array_equal(host(graphs.degrees(edges, 50)), graphs.degrees(host(edges), 50))
    scores = np.random.default_rng(3).random(edges.shape[0])
    found = importance.mean_over_neighbours(strict.asarray(scores), edges, 50)
    np.testing.assert_array_equal(host(found), importance.mean_over_neighbours(scores, host(edges), 50))


def test_edge_distortion():
    rng = np.random.default_rng(3)
    values, vectors, edges = rng.random(4), rng.normal(size=(30, 4)), rng.integers(0, 30, size=(50, 2))
    found = pencil.distortion_of_edges(*map(strict.asarray, (values, vectors, edges)))
    np.testing.assert_allclose(host(found), pencil.distortion_of_edges(values, vectors, edges), rtol=1e-14)


def test_dense_pencil(pair):
    edges, left, right = pair
    on_strict = [strict.asarray(one) for one in (left, right)]
    np.testing.assert_allclose(
        host(pencil.all_eigenvalues(*on_strict)), pencil.all_eigenvalues(left, right), rtol=1e-10
    )
    found = pencil.full_distortion_of_edges(*on_strict, strict.asarray(edges))
    np.testing.assert_allclose(host(found), pencil.full_distortion_of_edges(left, right, edges), rtol=1e-10)
    values, vectors, worst = pencil.top_eigenpairs(*on_strict, 9)
    assert worst == pytest.approx(pencil.residual(left, right, host(values), host(vectors)), rel=1e-3)
    np.testing.assert_allclose(host(values), pencil.all_eigenvalues(left, right)[:9], rtol=1e-10)


@pytest.mark.parametrize("solver", [lobpcg, lanczos], ids=["lobpcg", "lanczos"])
def test_iterative_pencil(pair, solver):
    _, left, right = pair
    values, vectors = solver.top_eigenpairs(strict.asarray(left), strict.asarray(right), 5, 1e-8)
    np.testing.assert_allclose(host(values), pencil.all_eigenvalues(left, right)[:5], rtol=1e-9)
    np.testing.assert_allclose(host(vectors).T @ right @ host(vectors), np.eye(5), atol=1e-8)


def test_systems(pair):
    right = pair[2]
    wanted = np.random.default_rng(8).normal(size=(160, 3))
    found = host(solve.solve_laplacian(strict.asarray(right), strict.asarray(wanted), 1e-10))
    np.testing.assert_allclose(right @ found, wanted - wanted.mean(axis=0), atol=1e-8)


def test_inside_of_the_quadrature(pair):
    _, left, right = pair
    probe = np.random.default_rng(9).normal(size=(160, 4))
    probe -= probe.mean(axis=0)
    found = density._tridiagonal(*map(strict.asarray, (left, right, probe)))
    for one, other in zip(found, density._tridiagonal(left, right, probe), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_inside_of_the_sketch(pair):
    edges, _, right = pair
    degree, weights = np.diag(right), np.random.default_rng(10).random(len(edges)) + 0.5
    found = sketch._rough(*map(strict.asarray, (degree.copy(), edges, weights)))
    np.testing.assert_allclose(host(found), sketch._rough(degree, edges, weights), rtol=1e-14)
    values = np.random.default_rng(11).normal(size=(160, 3))
    found = sketch._squared_differences(*map(strict.asarray, (values, edges[:, 0].copy(), edges[:, 1].copy())))
    np.testing.assert_allclose(host(found), sketch._squared_differences(values, *edges.T), rtol=1e-14)


def test_totals_of_a_library_without_bincount():
    found = arrays.totals(*map(strict.asarray, (np.asarray([1.0, 2.0, 4.0]), np.asarray([2, 0, 2]))), 4)
    np.testing.assert_array_equal(host(found), [2.0, 0.0, 5.0, 0.0])


def test_elimination():
    rng = np.random.default_rng(12)
    signals, weight = np.maximum(rng.normal(size=(300, 90)), 0), rng.normal(size=(8, 90))
    expected = elimination.eliminate(signals.T @ signals, weight, 1e-3)
    found = elimination.eliminate(strict.asarray(signals.T @ signals), strict.asarray(weight), 1e-3)
    np.testing.assert_array_equal(found.order_N, expected.order_N)
    np.testing.assert_allclose(found.cost_N, expected.cost_N, rtol=1e-9)


def test_a_refit():
    rng = np.random.default_rng(0)
    rows, target, start = rng.normal(size=(60, 12)), rng.normal(size=(60, 3)), rng.normal(size=(3, 12))
    sums = [(rows[part].T @ rows[part], rows[part].T @ target[part]) for part in (slice(40), slice(40, 60))]
    given = [repair.Products(*map(strict.asarray, one)) for one in sums]
    expected = repair.refit(start, *(repair.Products(*one) for one in sums), 1e-4)
    np.testing.assert_allclose(host(repair.refit(strict.asarray(start), *given, 1e-4)), expected, atol=1e-10)
