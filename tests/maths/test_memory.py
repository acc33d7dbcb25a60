"""Beyond 8192 neurons nothing of N x N is made."""

import tracemalloc

import numpy as np
import pytest

from cria_dist.maths import density, graphs, importance, neighbours, pencil, sketch

SIZE = 8200


def whole_site(pre, post):
    edges = [graphs.connect(one, graphs.union_edges(neighbours.nearest_neighbours(one, 8)))[0] for one in (pre, post)]
    left, right = (graphs.laplacian(one, SIZE) for one in edges)
    values, exact = density.whole_spectrum(left, right, edges[1])
    top, vectors, _ = pencil.top_eigenpairs(left, right, 4)
    sketched = sketch.distortion_of_edges(edges[0], np.ones(len(edges[0])), right, projections=64)
    for scores in (pencil.distortion_of_edges(top, vectors, edges[0]), sketched):
        assert np.isfinite(importance.mean_over_neighbours(scores, edges[0], SIZE)).all()
    assert (exact, values.size) == (False, SIZE - 1)


@pytest.mark.slow
@pytest.mark.soak
def test_a_site_of_8200_neurons_needs_a_quarter_of_a_square_of_doubles(monkeypatch):
    monkeypatch.setattr(density, "STEPS", 6)  # each holds 1 MiB
    pre = np.random.default_rng(0).standard_t(5, size=(SIZE, 24)).astype(np.float32)
    post = np.maximum(pre - 0.3, 0)
    tracemalloc.start()
    try:
        whole_site(pre, post)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SIZE * SIZE * 8 / 4  # not even one of single precision
