"""Random and magnitude."""

from dataclasses import replace

import numpy as np

from cria_dist.methods import Magnitude, Random, SiteStatistics


def test_magnitude_is_the_coupled_norm(make_statistics):
    statistics = make_statistics()
    np.testing.assert_array_equal(Magnitude().score(statistics).keep_N, statistics.weight_norm_N)


def test_random_follows_the_seed_only(make_statistics):
    statistics = make_statistics()
    first = Random().score(statistics).keep_N
    np.testing.assert_array_equal(Random().score(SiteStatistics(width=64, seed=statistics.seed)).keep_N, first)
    assert (Random().score(replace(statistics, seed=1)).keep_N != first).all()


def test_random_is_uniform():
    scores = Random().score(SiteStatistics(width=20_000, seed=3)).keep_N
    assert scores.min() >= 0
    assert scores.max() < 1
    np.testing.assert_allclose(np.quantile(scores, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.015)
