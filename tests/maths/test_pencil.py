"""The pencil against a dense reference on the subspace orthogonal to the constant vector."""

import itertools

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths import graphs, lanczos, lobpcg, neighbours, pencil


def laplacian(edges, size):
    return graphs.laplacian(np.asarray(edges), size)


def reference(left, right):
    """All pairs outside span(1), descending, in an orthonormal basis of its complement."""
    size = left.shape[0]
    basis = scipy.linalg.null_space(np.ones((1, size)))
    values, rotated = scipy.linalg.eigh(basis.T @ left.toarray() @ basis, basis.T @ right.toarray() @ basis)
    return values[::-1], (basis @ rotated)[:, ::-1]


def knn_pair(size, seed=0, k=8, observations=40):
    """Edges of the two graphs of a ReLU layer."""
    pre = np.random.default_rng(seed).standard_t(4, size=(size, observations))
    post = np.maximum(pre - 0.3, 0)
    return tuple(
        graphs.connect(signals, graphs.union_edges(neighbours.nearest_neighbours(signals, k)))[0]
        for signals in (pre, post)
    )


def complete(size):
    return list(itertools.combinations(range(size), 2))


def star(size):
    return [(0, node) for node in range(1, size)]


def cycle(size):
    return [*((node, node + 1) for node in range(size - 1)), (0, size - 1)]


@st.composite
def connected_edges(draw, size):
    """A random tree plus random edges."""
    tree = {(draw(st.integers(0, node - 1)), node) for node in range(1, size)}
    extra = draw(st.sets(st.sampled_from(complete(size)), max_size=2 * size))
    return np.asarray(sorted(tree | extra))


@st.composite
def graph_pairs(draw):
    size = draw(st.integers(3, 16))
    return size, draw(connected_edges(size)), draw(connected_edges(size))


@pytest.mark.parametrize(("size", "count"), [(12, 11), (60, 1), (60, 25), (200, 10)])
def test_top_eigenpairs_equal_the_reference(library, size, count):
    left_edges, right_edges = knn_pair(size)
    left, right = laplacian(left_edges, size), laplacian(right_edges, size)
    expected, _ = reference(left, right)
    values, vectors, worst = pencil.top_eigenpairs(
        graphs.laplacian(arrays.to_device(left_edges, library), size),
        graphs.laplacian(arrays.to_device(right_edges, library), size),
        count,
    )
    values, vectors = arrays.to_numpy(values), arrays.to_numpy(vectors)
    np.testing.assert_allclose(values, expected[:count], rtol=1e-9)
    np.testing.assert_allclose(vectors.T @ (right @ vectors), np.eye(count), atol=1e-9)
    np.testing.assert_allclose(vectors.sum(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(left @ vectors, (right @ vectors) * values, atol=1e-9 * values[0] * size)
    assert worst < 1e-9


@pytest.mark.parametrize("size", [3, 60, 200])
def test_all_eigenvalues_equal_the_reference(library, size):
    left_edges, right_edges = knn_pair(size, k=min(8, size - 1))
    values = pencil.all_eigenvalues(
        graphs.laplacian(arrays.to_device(left_edges, library), size),
        graphs.laplacian(arrays.to_device(right_edges, library), size),
    )
    expected, _ = reference(laplacian(left_edges, size), laplacian(right_edges, size))
    assert values.shape == (size - 1,)
    np.testing.assert_allclose(arrays.to_numpy(values), expected, rtol=1e-9)


def test_full_distortion_equals_the_reference(library):
    left_edges, right_edges = knn_pair(120)
    values, vectors = reference(laplacian(left_edges, 120), laplacian(right_edges, 120))
    expected = ((vectors[left_edges[:, 0]] - vectors[left_edges[:, 1]]) ** 2) @ values
    scores = pencil.full_distortion_of_edges(
        graphs.laplacian(arrays.to_device(left_edges, library), 120),
        graphs.laplacian(arrays.to_device(right_edges, library), 120),
        arrays.to_device(left_edges, library),
    )
    np.testing.assert_allclose(arrays.to_numpy(scores), expected, rtol=1e-9)


@given(pair=graph_pairs())
@settings(deadline=None, max_examples=80)
def test_random_pairs_follow_the_definition(pair):
    size, left_edges, right_edges = pair
    left, right = laplacian(left_edges, size), laplacian(right_edges, size)
    expected, _ = reference(left, right)
    values, vectors, worst = pencil.top_eigenpairs(left, right, size - 1)
    np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(pencil.all_eigenvalues(left, right), expected, rtol=1e-8, atol=1e-10)
    assert worst <= pencil.RESIDUAL_TOLERANCE
    assert (values > 0).all()
    np.testing.assert_allclose(vectors.T @ (right @ vectors), np.eye(size - 1), atol=1e-8)
    np.testing.assert_allclose(
        pencil.full_distortion_of_edges(left, right, left_edges),
        pencil.distortion_of_edges(values, vectors, left_edges),
        rtol=1e-7,
        atol=1e-9,
    )


@given(pair=graph_pairs(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_renaming_the_neurons_renames_the_scores(pair, seed):
    size, left_edges, right_edges = pair
    new_name = np.random.default_rng(seed).permutation(size)
    renamed_left, renamed_right = new_name[left_edges], new_name[right_edges]
    left, right = laplacian(left_edges, size), laplacian(right_edges, size)
    other_left, other_right = laplacian(renamed_left, size), laplacian(renamed_right, size)
    np.testing.assert_allclose(
        pencil.all_eigenvalues(other_left, other_right), pencil.all_eigenvalues(left, right), rtol=1e-8
    )
    np.testing.assert_allclose(
        pencil.full_distortion_of_edges(other_left, other_right, renamed_left),
        pencil.full_distortion_of_edges(left, right, left_edges),
        rtol=1e-8,
    )


@given(pair=graph_pairs())
@settings(deadline=None, max_examples=40)
def test_adding_an_input_edge_lowers_no_eigenvalue_and_swapping_inverts_them(pair):
    size, left_edges, right_edges = pair
    left, right = laplacian(left_edges, size), laplacian(right_edges, size)
    values = pencil.all_eigenvalues(left, right)
    everything = laplacian(complete(size), size)
    assert (pencil.all_eigenvalues(everything, right) >= values * (1 - 1e-9)).all()
    np.testing.assert_allclose(pencil.all_eigenvalues(right, left), 1 / values[::-1], rtol=1e-7)


def test_equal_graphs_have_all_eigenvalues_one_and_score_the_effective_resistance():
    edges, _ = knn_pair(150)
    matrix = laplacian(edges, 150)
    np.testing.assert_allclose(pencil.all_eigenvalues(matrix, matrix), np.ones(149), rtol=1e-10)
    values, vectors, _ = pencil.top_eigenpairs(matrix, matrix, 12)
    np.testing.assert_allclose(values, np.ones(12), rtol=1e-10)
    np.testing.assert_allclose(vectors.T @ (matrix @ vectors), np.eye(12), atol=1e-10)
    pseudo = np.linalg.pinv(matrix.toarray(), hermitian=True)
    left, right = edges.T
    resistance = pseudo[left, left] + pseudo[right, right] - 2 * pseudo[left, right]
    scores = pencil.full_distortion_of_edges(matrix, matrix, edges)
    np.testing.assert_allclose(scores, resistance, rtol=1e-9)
    assert scores.sum() == pytest.approx(149)  # Foster: the resistances of the edges add up to N - 1


def test_known_pairs():
    size = 10
    full, hub, ring = (laplacian(edges, size) for edges in (complete(size), star(size), cycle(size)))
    np.testing.assert_allclose(pencil.all_eigenvalues(2 * ring, ring), np.full(size - 1, 2.0), rtol=1e-12)
    np.testing.assert_allclose(pencil.all_eigenvalues(full, hub), [10.0] * 8 + [1.0], rtol=1e-12)
    np.testing.assert_allclose(pencil.all_eigenvalues(hub, full), [1.0] + [0.1] * 8, rtol=1e-12)
    waves = np.sort(2 - 2 * np.cos(2 * np.pi * np.arange(1, size) / size))
    np.testing.assert_allclose(pencil.all_eigenvalues(ring, full), waves[::-1] / size, rtol=1e-12)
    np.testing.assert_allclose(pencil.all_eigenvalues(full, ring), size / waves, rtol=1e-12)


@pytest.mark.parametrize("name", ["path", "cycle", "complete", "star"])
@pytest.mark.parametrize("solver", ["dense", "lobpcg", "lanczos"])
def test_textbook_spectra_beside_the_complete_graph(name, solver):
    size, count = 120, 6
    angles = np.pi * np.arange(size) / size
    edges, spectrum = {
        "path": (cycle(size)[:-1], 2 - 2 * np.cos(angles)),
        "cycle": (cycle(size), 2 - 2 * np.cos(2 * angles)),
        "complete": (complete(size), np.full(size, float(size))),
        "star": (star(size), np.asarray([float(size)] + [1.0] * (size - 1))),
    }[name]
    solve = {
        "dense": lambda left, right: pencil.top_eigenpairs(left, right, count)[:2],
        "lobpcg": lambda left, right: lobpcg.top_eigenpairs(left, right, count, 1e-8),
        "lanczos": lambda left, right: lanczos.top_eigenpairs(left, right, count, 1e-8),
    }[solver]
    values, _ = solve(laplacian(edges, size), laplacian(complete(size), size))
    # L_Y = n I - 11^T, so outside the null space zeta = lambda / n
    np.testing.assert_allclose(values, np.sort(spectrum)[::-1][:count] / size, rtol=1e-9)


def test_graphs_of_different_sizes_are_an_error():
    left, right = laplacian(cycle(10), 10), laplacian(cycle(12), 12)
    for solve in SOLVERS.values():
        with pytest.raises(NumericError, match=r"10 neurons and an output graph of 12.*record the site again"):
            solve(left, right, np.asarray(cycle(10)))


def test_two_identical_neurons_are_neighbours_and_their_pencil_is_sound():
    pre = np.random.default_rng(5).normal(size=(60, 30))
    pre[41] = pre[3]
    left_edges, right_edges = (
        graphs.connect(one, graphs.union_edges(neighbours.nearest_neighbours(one, 6)))[0]
        for one in (pre, np.maximum(pre, 0))
    )
    left, right = laplacian(left_edges, 60), laplacian(right_edges, 60)
    assert [3, 41] in left_edges.tolist()
    assert [3, 41] in right_edges.tolist()
    expected, _ = reference(left, right)
    values, _, worst = pencil.top_eigenpairs(left, right, 59)
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    assert worst < 1e-9


@pytest.mark.parametrize("count", [1, 40, 149])
def test_no_pair_is_lost_where_all_eigenvalues_are_equal(count, monkeypatch):
    def forgetful(matrix, subset_by_index, driver):
        values, vectors = np.linalg.eigh(matrix)
        return values[-1:], vectors[:, -1:]

    monkeypatch.setattr(arrays.scipy.linalg, "eigh", forgetful)
    matrix = laplacian(knn_pair(150)[0], 150)
    values, vectors, _ = pencil.top_eigenpairs(matrix, matrix, count)
    np.testing.assert_allclose(values, np.ones(count), rtol=1e-10)
    np.testing.assert_allclose(vectors.T @ (matrix @ vectors), np.eye(count), atol=1e-10)


def test_scores_scale_with_the_graphs():
    left_edges, right_edges = knn_pair(40)
    left, right = laplacian(left_edges, 40), laplacian(right_edges, 40)
    scores = pencil.full_distortion_of_edges(left, right, left_edges)
    np.testing.assert_allclose(pencil.full_distortion_of_edges(3 * left, right, left_edges), 3 * scores, rtol=1e-10)
    np.testing.assert_allclose(pencil.full_distortion_of_edges(left, 2 * right, left_edges), scores / 4, rtol=1e-10)


def test_edge_distortion_by_hand():
    values = np.asarray([3.0, 0.5])
    vectors = np.asarray([[1.0, 0.0], [0.0, 2.0], [-1.0, -2.0]])
    edges = np.asarray([[0, 1], [0, 2], [1, 2]])
    np.testing.assert_array_equal(pencil.distortion_of_edges(values, vectors, edges), [5.0, 14.0, 11.0])


def test_residual_is_what_it_says_and_notices_wrong_pairs():
    left_edges, right_edges = knn_pair(80)
    left, right = laplacian(left_edges, 80), laplacian(right_edges, 80)
    values, vectors, worst = pencil.top_eigenpairs(left, right, 3)
    assert worst == pencil.residual(left, right, values, vectors) < 1e-12
    wrong = values * np.asarray([1.0, 1.02, 1.0])
    expected = 0.02 / 2.02  # |L_X v - 1.02 zeta L_Y v| over |L_X v| + 1.02 zeta |L_Y v|, both parallel
    assert pencil.residual(left, right, wrong, vectors) == pytest.approx(expected, rel=1e-6)


def test_pairs_above_the_tolerance_are_an_error(monkeypatch):
    left_edges, right_edges = knn_pair(60)
    honest = pencil._top_dense

    def sloppy(left, right, count):
        values, vectors = honest(left, right, count)
        return values * (1 + 1e-5), vectors

    monkeypatch.setattr(pencil, "_top_dense", sloppy)
    with pytest.raises(NumericError, match=r"residual 5\.0e-06"):
        pencil.top_eigenpairs(laplacian(left_edges, 60), laplacian(right_edges, 60), 4)


def test_fewer_pairs_than_asked_are_an_error(monkeypatch):
    left_edges, right_edges = knn_pair(60)
    honest = pencil._top_dense
    monkeypatch.setattr(pencil, "_top_dense", lambda left, right, count: honest(left, right, count - 1))
    with pytest.raises(NumericError, match=r"3 of 4 eigenpairs"):
        pencil.top_eigenpairs(laplacian(left_edges, 60), laplacian(right_edges, 60), 4)


@pytest.mark.parametrize("count", [-1, 0, 10, 11])
def test_count_out_of_range_is_an_error(count):
    ring = laplacian(cycle(10), 10)
    with pytest.raises(NumericError, match=rf"{count} eigenpairs asked of 10 neurons; at most 9 exist"):
        pencil.top_eigenpairs(ring, ring, count)


SOLVERS = {
    "all_eigenvalues": lambda left, right, edges: pencil.all_eigenvalues(left, right),
    "top_eigenpairs": lambda left, right, edges: pencil.top_eigenpairs(left, right, 2)[0],
    "full_distortion": pencil.full_distortion_of_edges,
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("seed", range(12))
def test_a_disconnected_output_graph_is_an_error(solver, seed):
    size = 12 + 3 * seed
    left_edges, right_edges = knn_pair(size, seed, k=3)
    half = np.random.default_rng(seed).random(size) < 0.5
    half[:2] = True, False
    apart = right_edges[half[right_edges[:, 0]] == half[right_edges[:, 1]]]
    with pytest.raises(NumericError, match="output graph is not connected"):
        solver(laplacian(left_edges, size), laplacian(apart, size), left_edges)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_long_thin_output_graph_is_still_connected(solver):
    size = 512
    chain = cycle(size)[:-1]
    result = solver(laplacian(cycle(size), size), laplacian(chain, size), np.asarray(cycle(size)))
    assert np.isfinite(result).all()


@pytest.fixture
def iterative(monkeypatch):
    monkeypatch.setattr(pencil, "DENSE_LIMIT", 0)


@pytest.mark.parametrize("count", [1, 10, 40])
def test_lobpcg_equals_dense(iterative, library, count):
    size = 400
    left_edges, right_edges = knn_pair(size)
    left, right = laplacian(left_edges, size), laplacian(right_edges, size)
    dense_values, dense_vectors = pencil._top_dense(left, right, count)
    values, vectors, worst = pencil.top_eigenpairs(
        graphs.laplacian(arrays.to_device(left_edges, library), size),
        graphs.laplacian(arrays.to_device(right_edges, library), size),
        count,
    )
    values, vectors = arrays.to_numpy(values), arrays.to_numpy(vectors)
    np.testing.assert_allclose(values, dense_values, rtol=1e-6)
    np.testing.assert_allclose(vectors.T @ (right @ vectors), np.eye(count), atol=1e-6)
    np.testing.assert_allclose(vectors.sum(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(
        pencil.distortion_of_edges(values, vectors, left_edges),
        pencil.distortion_of_edges(dense_values, dense_vectors, left_edges),
        rtol=1e-5,
        atol=1e-7,
    )
    assert worst <= pencil.RESIDUAL_TOLERANCE


def test_lobpcg_equals_dense_when_eigenvalues_repeat(iterative):
    left_half, right_half = knn_pair(200)
    left_edges, right_edges = (
        np.concatenate([edges, edges + 200, [[0, 200]]]) for edges in (left_half, right_half)
    )  # two copies joined by one bridge: values come in pairs
    left, right = laplacian(left_edges, 400), laplacian(right_edges, 400)
    expected, _ = pencil._top_dense(left, right, 10)
    assert np.ptp(expected[:2]) < 1e-3 * expected[0]
    values, vectors, _ = pencil.top_eigenpairs(left, right, 10)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(vectors.T @ (right @ vectors), np.eye(10), atol=1e-6)


def test_lobpcg_with_one_eigenvalue_only(iterative):
    edges, _ = knn_pair(400)
    matrix = laplacian(edges, 400)
    values, vectors, _ = pencil.top_eigenpairs(matrix, matrix, 10)
    np.testing.assert_allclose(values, np.ones(10), rtol=1e-6)
    np.testing.assert_allclose(vectors.T @ (matrix @ vectors), np.eye(10), atol=1e-6)


@pytest.mark.parametrize(("left", "right"), [(complete, star), (star, complete), (cycle, complete)])
def test_lobpcg_on_textbook_pairs(iterative, left, right):
    left, right = laplacian(left(400), 400), laplacian(right(400), 400)
    values, _, _ = pencil.top_eigenpairs(left, right, 10)
    np.testing.assert_allclose(values, pencil.all_eigenvalues(left, right)[:10], rtol=1e-6)


def test_lobpcg_values_descend_and_repeat_exactly(iterative):
    edges, _ = knn_pair(400)
    matrix = laplacian(edges, 400)
    first, _, _ = pencil.top_eigenpairs(matrix, matrix, 10)
    second, _, _ = pencil.top_eigenpairs(matrix, matrix, 10)
    assert (np.diff(first) <= 0).all()
    np.testing.assert_array_equal(first, second)


def test_many_pairs_beyond_the_dense_limit_equal_dense(iterative):
    left_edges, right_edges = knn_pair(150)
    left, right = laplacian(left_edges, 150), laplacian(right_edges, 150)
    values, _, _ = pencil.top_eigenpairs(left, right, 60)
    np.testing.assert_allclose(values, pencil.all_eigenvalues(left, right)[:60], rtol=1e-6)
