"""Neuron graphs against brute force, graph theory and their invariances."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths import graphs, neighbours


def squared_distances(signals_NM):
    wide = np.asarray(signals_NM, dtype=np.float64)
    return np.stack([((wide - row) ** 2).sum(axis=1) for row in wide])


def brute_force_neighbours(signals_NM, k):
    squared_NN = squared_distances(signals_NM)
    np.fill_diagonal(squared_NN, np.inf)
    return np.argsort(squared_NN, axis=1, kind="stable")[:, :k]


def complete(size):
    return np.asarray(list(itertools.combinations(range(size), 2)))


def path(size):
    return np.stack([np.arange(size - 1), np.arange(1, size)], axis=1)


def cycle(size):
    return np.concatenate([path(size), [[0, size - 1]]])


def star(size):
    return np.stack([np.zeros(size - 1, dtype=np.int64), np.arange(1, size)], axis=1)


def blobs(sizes, seed=0):
    """Well separated clouds, neurons in shuffled order."""
    rng = np.random.default_rng(seed)
    centres = 100.0 * np.eye(len(sizes), 8) * np.arange(1, len(sizes) + 1)[:, None]
    owners = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return centres[owners] + rng.normal(size=(owners.size, 8)), owners


@pytest.mark.parametrize(
    ("size", "observations", "k"), [(2, 3, 1), (11, 4, 10), (64, 1, 5), (130, 33, 9), (512, 96, 10)]
)
def test_neighbours_equal_brute_force(library, size, observations, k):
    signals = np.random.default_rng(size).standard_t(3, size=(size, observations))
    found = neighbours.nearest_neighbours(arrays.to_device(signals, library), k)
    np.testing.assert_array_equal(arrays.to_numpy(found), brute_force_neighbours(signals, k))


def test_neighbours_do_not_depend_on_the_tiles(monkeypatch):
    signals = np.random.default_rng(3).normal(size=(150, 40))
    whole = neighbours.nearest_neighbours(signals, 7)
    for rows, columns, limit in ((1, 150, 512), (37, 20, 8), (64, 1, 20), (149, 7, 512), (150, 50, 30)):
        monkeypatch.setattr(neighbours, "BLOCK_ROWS", rows)
        monkeypatch.setattr(neighbours, "BLOCK_COLUMNS", columns)
        monkeypatch.setattr(neighbours, "LIMIT_ROWS", limit)
        np.testing.assert_array_equal(neighbours.nearest_neighbours(signals, 7), whole)


def test_neighbours_survive_a_large_common_offset():
    signals = np.random.default_rng(5).normal(size=(120, 50))
    shifted = signals + 1e5 * np.random.default_rng(6).normal(size=50)
    np.testing.assert_array_equal(neighbours.nearest_neighbours(shifted, 6), brute_force_neighbours(signals, 6))


@given(
    signals=st.integers(2, 60).flatmap(
        lambda size: st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=size, max_size=size)
    ),
    k=st.integers(1, 8),
)
@settings(deadline=None, max_examples=150)
def test_equal_distances_are_ordered_by_index(signals, k):
    # small integers: every product is exact, so ties are exact in any arithmetic
    grid = np.asarray(signals, dtype=np.float64) * 4 * len(signals)
    assume(len(set(signals)) > 1)
    k = min(k, len(signals) - 1)
    centred = grid - grid.mean(axis=0)
    np.testing.assert_array_equal(neighbours.nearest_neighbours(grid, k), brute_force_neighbours(centred, k))


def test_more_ties_than_spare_candidates_are_ordered_by_index():
    grid = np.random.default_rng(8).integers(0, 2, size=(96, 2)).astype(np.float64)
    np.testing.assert_array_equal(neighbours.nearest_neighbours(grid, 4), brute_force_neighbours(grid, 4))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("copies", [2, 10, 25])
def test_exact_duplicates_are_ordered_by_index(dtype, copies):
    rng = np.random.default_rng(copies)
    originals = rng.normal(size=(300 // copies, 500)).astype(dtype)
    owners = rng.permutation(np.repeat(np.arange(len(originals)), copies))
    nearest = neighbours.nearest_neighbours(originals[owners], copies - 1)
    for neuron, row in enumerate(nearest):
        twins = np.flatnonzero(owners == owners[neuron])
        np.testing.assert_array_equal(row, twins[twins != neuron])


def test_single_precision_keeps_the_order_of_near_duplicates():
    rng = np.random.default_rng(11)
    originals = np.repeat(rng.normal(size=(20, 256)), 10, axis=0)
    signals = (originals + 1e-4 * rng.normal(size=originals.shape)).astype(np.float32)
    np.testing.assert_array_equal(neighbours.nearest_neighbours(signals, 5), brute_force_neighbours(signals, 5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_single_and_double_precision_signals_give_the_neighbours_of_double_arithmetic(dtype):
    signals = np.random.default_rng(12).standard_t(3, size=(256, 512)).astype(dtype)
    np.testing.assert_array_equal(neighbours.nearest_neighbours(signals, 10), brute_force_neighbours(signals, 10))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_signals_that_are_not_finite_are_an_error(bad):
    signals = np.ones((20, 4))
    signals[3, 1] = signals[7, 2] = bad
    with pytest.raises(NumericError, match=r"2 signal values are NaN or infinite"):
        neighbours.nearest_neighbours(signals, 3)


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_a_constant_site_is_an_error(value):
    with pytest.raises(NumericError, match=r"all 20 neurons have the same signals; record more tokens or exclude"):
        neighbours.nearest_neighbours(np.full((20, 4), value), 3)


def test_too_few_neurons_are_an_error():
    with pytest.raises(NumericError, match=r"5 neurons are too few for 5 neighbours; lower method\.\w+ below 5"):
        neighbours.nearest_neighbours(np.eye(5), 5)


def test_the_error_names_an_option_that_exists():
    from cria_dist.methods import Cria

    with pytest.raises(NumericError) as caught:
        neighbours.nearest_neighbours(np.eye(5), 5)
    option = str(caught.value).split("method.")[1].split()[0]
    assert option in Cria.model_fields


def test_union_of_a_hand_worked_graph():
    nearest = np.asarray([[1, 2], [0, 2], [1, 0], [2, 0]])
    np.testing.assert_array_equal(graphs.union_edges(nearest), [[0, 1], [0, 2], [0, 3], [1, 2], [2, 3]])


def test_neighbours_on_a_line():
    line = np.asarray([[0.0], [1.0], [3.0], [7.0], [7.5]])
    np.testing.assert_array_equal(neighbours.nearest_neighbours(line, 2), [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]])


@given(size=st.integers(3, 40), k=st.integers(1, 10), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=50)
def test_union_edges_are_the_neighbour_relation_sorted_and_once(size, k, seed):
    k = min(k, size - 1)
    nearest = neighbours.nearest_neighbours(np.random.default_rng(seed).normal(size=(size, 6)), k)
    expected = sorted({(min(p, int(q)), max(p, int(q))) for p in range(size) for q in nearest[p]})
    edges = graphs.union_edges(nearest)
    assert [tuple(edge) for edge in edges.tolist()] == expected
    assert graphs.degrees(edges, size).min() >= k


def graph_of(signals, k=6):
    return graphs.union_edges(neighbours.nearest_neighbours(signals, k))


@given(
    seed=st.integers(0, 999),
    factor=st.floats(1e-6, 1e6),
    offset=st.floats(-100, 100),
)
@settings(deadline=None, max_examples=40)
def test_graph_ignores_scale_and_a_common_shift(seed, factor, offset):
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(60, 20))
    shift = offset * rng.normal(size=20)
    np.testing.assert_array_equal(graph_of(signals * factor), graph_of(signals))
    np.testing.assert_array_equal(graph_of(signals + shift), graph_of(signals))


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_graph_ignores_signs_and_rotations_of_the_tokens_but_not_the_sign_of_a_neuron(seed):
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(60, 20)) + 1
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    np.testing.assert_array_equal(graph_of(-signals), graph_of(signals))
    np.testing.assert_array_equal(graph_of(signals * rng.choice([-1, 1], 20)), graph_of(signals))
    np.testing.assert_array_equal(graph_of(signals @ rotation), graph_of(signals))
    turned = signals.copy()
    turned[7] *= -1
    assert not np.array_equal(graph_of(turned), graph_of(signals))


def test_graph_follows_a_permutation_of_the_neurons():
    signals = np.random.default_rng(0).normal(size=(90, 30))
    order = np.random.default_rng(1).permutation(90)
    renamed = np.sort(order[graph_of(signals[order])], axis=1)
    assert set(map(tuple, renamed.tolist())) == set(map(tuple, graph_of(signals).tolist()))


def test_connected_graphs_are_left_alone():
    signals = np.random.default_rng(2).normal(size=(80, 10))
    edges = graph_of(signals, 10)
    joined, found = graphs.connect(signals, edges)
    assert found == 1
    np.testing.assert_array_equal(joined, edges)


@pytest.mark.parametrize("sizes", [(5, 5), (7, 4, 9), (12, 5, 6, 7, 20, 5)])
def test_components_are_joined_by_their_closest_pairs(library, sizes):
    signals, owners = blobs(sizes)
    size = owners.size
    edges = graphs.union_edges(neighbours.nearest_neighbours(signals, 3))
    before, labels = connected_components(graphs.adjacency(edges, size), directed=False)
    assert before >= len(sizes)
    on_device = arrays.to_device(signals, library)
    joined, found = graphs.connect(on_device, arrays.to_device(edges, library))
    joined = arrays.to_numpy(joined)

    squared = squared_distances(signals)
    between, pairs = np.zeros((before, before)), {}
    for one, other in itertools.combinations(range(before), 2):
        rows, columns = np.flatnonzero(labels == one), np.flatnonzero(labels == other)
        block = squared[np.ix_(rows, columns)]
        at = np.unravel_index(block.argmin(), block.shape)
        between[one, other] = block[at]
        pairs[one, other] = tuple(sorted((int(rows[at[0]]), int(columns[at[1]]))))
    tree = minimum_spanning_tree(between).tocoo()
    bridges = {pairs[min(ends), max(ends)] for ends in zip(tree.row.tolist(), tree.col.tolist(), strict=True)}

    assert found == before
    added = set(map(tuple, joined.tolist())) - set(map(tuple, edges.tolist()))
    assert added == bridges
    assert len(joined) == len(edges) + before - 1
    assert connected_components(graphs.adjacency(joined, size), directed=False)[0] == 1


def test_connect_does_not_depend_on_the_block_size(monkeypatch):
    signals, _ = blobs((9, 14, 6, 8))
    edges = graph_of(signals, 3)
    whole, _ = graphs.connect(signals, edges)
    monkeypatch.setattr(graphs, "BLOCK_ROWS", 5)
    np.testing.assert_array_equal(graphs.connect(signals, edges)[0], whole)


def test_connect_joins_isolated_neurons_into_their_spanning_tree():
    line = np.asarray([[0.0], [1.0], [2.5], [10.0]])
    edges, found = graphs.connect(line, np.empty((0, 2), dtype=np.int64))
    assert found == 4
    np.testing.assert_array_equal(edges, path(4))


@pytest.mark.parametrize(
    ("edges", "size", "spectrum"),
    [
        (path(9), 9, 2 - 2 * np.cos(np.pi * np.arange(9) / 9)),
        (cycle(9), 9, 2 - 2 * np.cos(2 * np.pi * np.arange(9) / 9)),
        (complete(9), 9, [0.0] + [9.0] * 8),
        (star(9), 9, [0.0] + [1.0] * 7 + [9.0]),
    ],
    ids=["path", "cycle", "complete", "star"],
)
def test_laplacian_has_the_spectrum_of_the_textbook(library, edges, size, spectrum):
    matrix = arrays.to_numpy(arrays.dense(graphs.laplacian(arrays.to_device(edges, library), size)))
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), np.sort(spectrum), atol=1e-12)


def test_laplacian_is_degree_minus_adjacency_and_its_rows_sum_to_zero():
    edges = graph_of(np.random.default_rng(4).normal(size=(50, 12)))
    laplacian, adjacency = graphs.laplacian(edges, 50).toarray(), graphs.adjacency(edges, 50).toarray()
    degrees = graphs.degrees(edges, 50)
    assert laplacian.dtype == np.float64
    np.testing.assert_array_equal(laplacian, np.diag(degrees) - adjacency)
    np.testing.assert_array_equal(laplacian.sum(axis=1), np.zeros(50))
    np.testing.assert_array_equal(adjacency, adjacency.T)
    assert set(np.unique(adjacency)) == {0.0, 1.0}


def test_degrees_count_nodes_without_edges():
    np.testing.assert_array_equal(graphs.degrees(np.asarray([[0, 2], [2, 3]]), 5), [1.0, 0.0, 2.0, 1.0, 0.0])
