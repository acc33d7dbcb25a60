"""Clusters of layers, by hand."""

import numpy as np
import pytest

from cria_dist.maths.cosine import cosine_sum
from cria_dist.maths.layer_clusters import (
    clusters,
    first_of,
    most_similar,
    redundant,
    similarity_to_first,
    threshold_for,
)

# each layer is like the one before it, and less and less like the first: comparing neighbours would chain them all
CHAIN = np.array(
    [
        [1.00, 0.99, 0.97, 0.90, 0.80, 0.70],
        [0.99, 1.00, 0.99, 0.97, 0.90, 0.80],
        [0.97, 0.99, 1.00, 0.99, 0.97, 0.90],
        [0.90, 0.97, 0.99, 1.00, 0.99, 0.96],
        [0.80, 0.90, 0.97, 0.99, 1.00, 0.99],
        [0.70, 0.80, 0.90, 0.96, 0.99, 1.00],
    ]
)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.995, [(0,), (1,), (2,), (3,), (4,), (5,)]),
        (0.98, [(0, 1), (2, 3), (4, 5)]),
        (0.97, [(0, 1, 2), (3, 4), (5,)]),
        (0.96, [(0, 1, 2), (3, 4, 5)]),
        (0.70, [(0, 1, 2, 3, 4, 5)]),
    ],
)
def test_a_layer_is_compared_with_the_first_of_its_run(threshold, expected):
    assert clusters(CHAIN, threshold) == expected


def test_equal_to_the_threshold_belongs():
    similarity = np.array([[1.0, 0.98], [0.98, 1.0]])
    assert clusters(similarity, 0.98) == [(0, 1)]
    assert clusters(similarity, np.nextafter(0.98, 1)) == [(0,), (1,)]


def test_a_gap_ends_a_cluster_for_good():
    """Layer 2 is unlike layer 0, so layer 3 is compared with 2, though it is like 0."""
    similarity = np.array([[1, 0.99, 0.5, 0.99], [0, 1, 0, 0], [0, 0, 1, 0.6], [0, 0, 0, 1]], dtype=float)
    assert clusters(similarity, 0.9) == [(0, 1), (2,), (3,)]
    assert first_of(similarity, 0.9) == [0, 0, 0, 2]
    np.testing.assert_array_equal(similarity_to_first(similarity, 0.9), [-1, 0.99, 0.5, 0.6])


def test_granularities_of_the_paper():
    found = [(0, 1, 2, 3, 4, 5, 6), (7,), (8, 9)]
    assert redundant(found, 1) == (1, 2, 3, 4, 5, 6, 9)
    assert redundant(found, 2) == (1, 3, 5, 9)
    assert redundant(found, 3) == (1, 4, 9)


def test_most_similar_with_ties_to_the_later_layer():
    similarity_L = np.array([-1, 0.98, 0.99, 0.98, 0.97])
    assert most_similar((1, 2, 3, 4), similarity_L, 2) == (2, 3)
    assert most_similar((1, 4), similarity_L, 5) == (1, 4)
    assert most_similar((1, 4), similarity_L, 0) == ()


@pytest.mark.parametrize(("count", "expected"), [(0, 0.995), (1, 0.99), (3, 0.99), (4, 0.96), (5, 0.70)])
def test_the_largest_threshold_that_spares_enough(count, expected):
    assert threshold_for(CHAIN, count, 0.995) == expected


def test_every_number_of_layers_can_be_reached():
    rng = np.random.default_rng(2)
    for size in (2, 5, 12):
        similarity = rng.uniform(-1, 1, size=(size, size))
        for count in range(size):
            threshold = threshold_for(similarity, count, 0.98)
            assert len(redundant(clusters(similarity, threshold), 1)) >= count
            assert threshold <= 0.98


def test_cosines_by_hand():
    before = np.array([[1, 0], [1, 1], [0, 0], [3, 4]], dtype=np.float32)
    after = np.array([[0, 2], [1, 0], [5, 5], [-6, -8]], dtype=np.float32)
    total, count = cosine_sum(before, after)
    assert count == 3, "a state of length zero has no direction"
    assert total == pytest.approx(0 + 0.5**0.5 - 1, rel=1e-12)
