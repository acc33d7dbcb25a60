"""The rivals: each by a small example worked by hand, and by what its formula stands for."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from cria_dist.methods import Activation, Flap, Magnitude, Random, SiteStatistics, Taylor, Wanda
from cria_dist.records import Moments

SIGNAL_NT = np.asarray([[3.0, 4.0], [1.0, 1.0], [0.0, -2.0]])
"""Norms 5, sqrt(2), 2; means 3.5, 1, -1; variances 0.25, 0, 1."""
OUTPUT_DN = np.asarray([[0.6, 10.0, 3.0], [0.8, 0.0, 0.0]])
"""Norms of the columns 1, 10, 3."""


def site(signal_NT, output_DN):
    moments = Moments(signal_NT.shape[1], signal_NT.sum(axis=1), signal_NT @ signal_NT.T)
    return SiteStatistics(len(signal_NT), moments=moments, output_norm_N=np.linalg.norm(output_DN, axis=0))


@pytest.fixture
def drawn():
    """A signal with means far from zero, and an output map."""
    rng = np.random.default_rng(4)
    return rng.normal(rng.uniform(-2, 2, (20, 1)), size=(20, 300)), rng.normal(size=(7, 20))


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        (Activation(), [5.0, np.sqrt(2), 2.0]),
        (Wanda(), [5.0, np.sqrt(200), 6.0]),
        (Flap(), [0.25, 0.0, 9.0]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_worked_by_hand(method, by_hand):
    """Every one of the three keeps another neuron first."""
    np.testing.assert_allclose(method.score(site(SIGNAL_NT, OUTPUT_DN)).keep_N, by_hand, rtol=1e-12)


def test_activation_does_not_see_how_tokens_are_cut_into_sequences(drawn):
    signal_NT, _ = drawn
    norm_N = Activation().score(site(*drawn)).keep_N
    over_batch_N = np.linalg.norm(np.linalg.norm(signal_NT.reshape(20, 6, 50), axis=2), axis=1)
    np.testing.assert_allclose(norm_N, over_batch_N, rtol=1e-12)


def test_activation_is_at_least_minitrons_aggregation(drawn):
    """``sqrt(T) * |mean_t |a||_2`` over sequences of T tokens, with equality for a constant strength."""
    signal_NT, output_DN = drawn
    signal_NT[3] = np.where(signal_NT[3] > 0, 1.5, -1.5)
    norm_N = Activation().score(site(signal_NT, output_DN)).keep_N
    theirs_N = np.sqrt(50) * np.linalg.norm(np.abs(signal_NT.reshape(20, 6, 50)).mean(axis=2), axis=1)
    np.testing.assert_allclose(norm_N[3], theirs_N[3], rtol=1e-12)
    assert (np.delete(norm_N, 3) > 1.01 * np.delete(theirs_N, 3)).all()


def test_wanda_is_the_change_of_the_output_without_the_neuron(drawn):
    signal_NT, output_DN = drawn
    score_N = Wanda().score(site(*drawn)).keep_N
    element_DN = np.abs(output_DN) * np.linalg.norm(signal_NT, axis=1)
    np.testing.assert_allclose(score_N, np.linalg.norm(element_DN, axis=0), rtol=1e-12)
    changes = [np.linalg.norm(np.outer(output_DN[:, unit], signal_NT[unit])) for unit in range(20)]
    np.testing.assert_allclose(score_N, changes, rtol=1e-12)


def test_flap_is_the_error_that_a_bias_leaves(drawn):
    signal_NT, output_DN = drawn
    left = signal_NT - signal_NT.mean(axis=1, keepdims=True)
    errors = [np.square(np.outer(output_DN[:, unit], left[unit])).sum() / 300 for unit in range(20)]
    np.testing.assert_allclose(Flap().score(site(*drawn)).keep_N, errors, rtol=1e-10)


def test_taylor_is_what_was_taken_of_the_gradients(make_statistics):
    """What that is, is worked by hand in ``tests/stages/test_gradients.py``."""
    statistics = make_statistics()
    np.testing.assert_array_equal(Taylor().score(statistics).keep_N, statistics.taylor_N)
    assert Taylor(sequences=9).gradient_sample.sequences == 9


@pytest.mark.parametrize("knob", ["sequences", "shard_sequences"])
def test_taylor_takes_at_least_one_sequence(knob):
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Taylor(**{knob: 0})


def test_methods_without_gradients_have_no_sample_of_them():
    with pytest.raises(TypeError, match="Flap must define gradient_sample"):
        _ = Flap().gradient_sample


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
