"""Node scores by hand; which units fall."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist.maths.graphs import union_edges
from cria_dist.maths.importance import lowest, lowest_guarded, mean_over_neighbours
from cria_dist.maths.neighbours import nearest_neighbours

NO_EDGES = np.empty((0, 2), dtype=np.int32)


def test_mean_over_neighbours_by_hand():
    edges = np.asarray([[0, 1], [0, 2], [1, 2], [2, 3]])
    scores = np.asarray([1.0, 2.0, 4.0, 8.0])
    found = mean_over_neighbours(scores, edges, 4)
    np.testing.assert_allclose(found, [1.5, 2.5, 14 / 3, 8.0], rtol=1e-15)


def test_lowest_takes_the_lowest_and_breaks_ties_by_index():
    keep = np.asarray([2.0, 1.0, 3.0, 1.0, 1.0, -np.inf])
    np.testing.assert_array_equal(lowest(keep, 1), [5])
    np.testing.assert_array_equal(lowest(keep, 3), [1, 3, 5])
    np.testing.assert_array_equal(lowest(keep, 5), [0, 1, 3, 4, 5])
    np.testing.assert_array_equal(lowest(keep, 0), [])


def test_guard_by_hand():
    keep = np.asarray([1.0, 2.0, 3.0, 4.0, 5.0])
    chain = np.asarray([[0, 1], [1, 2], [2, 3], [3, 4]], dtype=np.int32)
    np.testing.assert_array_equal(lowest_guarded(keep, 2, chain), [0, 2])
    np.testing.assert_array_equal(lowest_guarded(keep, 3, chain), [0, 2, 4])
    np.testing.assert_array_equal(lowest_guarded(keep, 4, chain), [0, 1, 2, 4])  # fills up with the lowest skipped
    np.testing.assert_array_equal(lowest_guarded(keep, 5, chain), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(lowest_guarded(keep, 0, chain), [])


def test_dead_units_fall_first_and_ban_nobody():
    keep = np.asarray([-np.inf, -np.inf, 1.0, 2.0, 3.0])
    edges = np.asarray([[0, 1], [0, 2], [1, 2], [2, 3]], dtype=np.int32)
    np.testing.assert_array_equal(lowest_guarded(keep, 2, edges), [0, 1])
    np.testing.assert_array_equal(lowest_guarded(keep, 3, edges), [0, 1, 2])
    np.testing.assert_array_equal(lowest_guarded(keep, 4, edges), [0, 1, 2, 4])


def test_thirty_near_duplicates_lose_one_per_neighbourhood():
    rng = np.random.default_rng(0)
    signals = rng.normal(size=(120, 64))
    signals[:30] = signals[0] + 1e-3 * rng.normal(size=(30, 64))
    edges = union_edges(nearest_neighbours(signals, 29))
    keep = np.concatenate([rng.uniform(0, 0.1, 30), rng.uniform(1, 2, 90)])
    removed = lowest_guarded(keep, 3, edges.astype(np.int32))
    assert (removed < 30).sum() == 1  # they all know each other; unguarded all three would be duplicates
    assert (lowest(keep, 3) < 30).all()


def test_near_duplicates_with_sparse_neighbourhoods_never_fall_next_to_each_other():
    rng = np.random.default_rng(1)
    signals = rng.normal(size=(150, 64))
    signals[:30] = signals[0] + 1e-3 * rng.normal(size=(30, 64))
    edges = union_edges(nearest_neighbours(signals, 10)).astype(np.int32)
    keep = np.concatenate([rng.uniform(0, 0.1, 30), rng.uniform(1, 2, 120)])
    removed = lowest_guarded(keep, 8, edges)
    assert not any(np.isin(edge, removed).all() for edge in edges)
    assert (removed < 30).sum() < 8


scores_of_units = st.lists(
    st.one_of(st.just(-np.inf), st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=30
)


@given(keep=scores_of_units, data=st.data())
@settings(deadline=None, max_examples=200)
def test_exactly_count_distinct_units_fall(keep, data):
    size = len(keep)
    unit = st.integers(0, size - 1)
    pairs = data.draw(st.sets(st.tuples(unit, unit).filter(lambda pair: pair[0] < pair[1]), max_size=60))
    edges = np.asarray(sorted(pairs), dtype=np.int32).reshape(-1, 2)
    count = data.draw(st.integers(0, size))
    scores = np.asarray(keep)
    for removed in (lowest(scores, count), lowest_guarded(scores, count, edges)):
        assert removed.dtype == np.int64
        assert len(removed) == count == len(set(removed.tolist()))
        assert (np.diff(removed) > 0).all()
        assert ((removed >= 0) & (removed < size)).all()
        assert np.isneginf(scores[removed]).sum() == min(count, np.isneginf(scores).sum())  # dead first


@given(keep=scores_of_units, count=st.integers(0, 30))
@settings(deadline=None)
def test_without_edges_the_guard_changes_nothing(keep, count):
    scores = np.asarray(keep)
    count = min(count, scores.size)
    np.testing.assert_array_equal(lowest_guarded(scores, count, NO_EDGES), lowest(scores, count))


@pytest.mark.parametrize("count", [1, 7, 13, 40])
def test_the_guard_spares_neighbours_while_others_are_left(count):
    rng = np.random.default_rng(count)
    keep = rng.normal(size=100)
    edges = union_edges(nearest_neighbours(rng.normal(size=(100, 20)), 4)).astype(np.int32)
    neighbours = [set(edges[edges[:, 0] == u, 1]) | set(edges[edges[:, 1] == u, 0]) for u in range(100)]
    walk: list[int] = []
    for unit in np.argsort(keep).tolist():
        if not neighbours[unit] & set(walk):
            walk.append(unit)
    rest = [unit for unit in np.argsort(keep).tolist() if unit not in set(walk)]
    np.testing.assert_array_equal(lowest_guarded(keep, count, edges), np.sort((walk + rest)[:count]))
