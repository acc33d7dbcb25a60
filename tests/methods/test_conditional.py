"""The conditional method by hand, and what it promises beyond the contract."""

import numpy as np
import pytest

from cria_dist.methods import Conditional, SiteStatistics
from cria_dist.records import Moments

TINY = Conditional(ridge=1e-12)


def site(gram, weight):
    width = len(gram)
    return SiteStatistics(
        width,
        moments=Moments(10, np.zeros(width), np.asarray(gram, dtype=float)),
        weight_norm_N=np.ones(width),
        output_norm_N=np.ones(width),
        output_DN=np.asarray(weight, dtype=float),
    )


def test_unrelated_neurons_cost_their_own_energy():
    """Energies w^2 g: 1 * 4, 9 * 1, 0.25 * 9; the cheapest goes first, scores are shares of 15.25."""
    verdict = TINY.score(site(np.diag([4, 1, 9]), [[1, 3, 0.5]]))
    np.testing.assert_allclose(verdict.keep_N, [6.25 / 15.25, 1, 2.25 / 15.25], rtol=1e-9)


def test_what_another_neuron_explains_costs_nothing():
    """Signals a, b and a + b, read with weight one each: any one is explained by the two others, so the first step is
    free. Then a + b is left with one of them, or a and b: outputs 2a + 2b either way."""
    gram = np.asarray([[1, 0, 1], [0, 1, 1], [1, 1, 2]])
    verdict = TINY.score(site(gram, [[1, 1, 1]]))
    shares = np.sort(verdict.keep_N)
    assert shares[0] == pytest.approx(0, abs=1e-6)
    assert shares[1] == pytest.approx(0, abs=1e-6)  # a + b alone, with weight two
    assert shares[2] == pytest.approx(1, rel=1e-6)
    assert verdict.keep_N.argmax() == 2


def test_the_next_layer_decides_between_equal_signals():
    verdict = TINY.score(site(np.diag([1, 1]), [[1, 2], [0, 0]]))
    np.testing.assert_allclose(verdict.keep_N, [0.2, 1])


def test_a_layer_without_output_is_still_ranked():
    verdict = TINY.score(site(np.zeros((4, 4)), np.ones((2, 4))))
    assert len(set(verdict.keep_N.tolist())) == 4
    assert np.isfinite(verdict.keep_N).all()
