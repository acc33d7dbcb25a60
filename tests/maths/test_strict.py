"""What needs no sparse matrix runs on the array API alone."""

import array_api_strict as strict
import numpy as np
import pytest

from cria_dist.maths import graphs, neighbours, pencil


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbours_on_the_strict_library(dtype, copies):
    signals = np.repeat(np.random.default_rng(0).standard_t(3, size=(90, 20)), copies, axis=0).astype(dtype)
    found = neighbours.nearest_neighbours(strict.asarray(signals), 6)
    assert type(found).__module__.startswith("array_api_strict")
    np.testing.assert_array_equal(np.from_dlpack(found), neighbours.nearest_neighbours(signals, 6))


def test_near_duplicates_on_the_strict_library():
    rng = np.random.default_rng(1)
    signals = np.repeat(rng.normal(size=(4, 64)), 40, axis=0) + 1e-6 * rng.normal(size=(160, 64))
    signals = signals.astype(np.float32)  # more near-duplicates than a pool holds
    found = neighbours.nearest_neighbours(strict.asarray(signals), 5)
    np.testing.assert_array_equal(np.from_dlpack(found), neighbours.nearest_neighbours(signals, 5))


def test_edges_on_the_strict_library():
    nearest = neighbours.nearest_neighbours(np.random.default_rng(2).normal(size=(50, 8)), 4)
    found = graphs.union_edges(strict.asarray(nearest))
    np.testing.assert_array_equal(np.from_dlpack(found), graphs.union_edges(nearest))


def test_edge_distortion_on_the_strict_library():
    rng = np.random.default_rng(3)
    values, vectors, edges = rng.random(4), rng.normal(size=(30, 4)), rng.integers(0, 30, size=(50, 2))
    found = pencil.distortion_of_edges(*map(strict.asarray, (values, vectors, edges)))
    np.testing.assert_allclose(np.from_dlpack(found), pencil.distortion_of_edges(values, vectors, edges), rtol=1e-14)
