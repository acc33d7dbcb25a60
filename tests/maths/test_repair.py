"""Repair against explicit least squares on explicit activations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths.repair import Products, least_squares, mean_bias, refit
from cria_dist.records import Moments


def moments_of(activations_TN):
    return Moments(len(activations_TN), activations_TN.sum(axis=0), activations_TN.T @ activations_TN)


def relu_layer(tokens=300, units=24, outputs=7, seed=0):
    rng = np.random.default_rng(seed)
    activations = np.maximum(rng.normal(size=(tokens, 10)) @ rng.normal(size=(10, units)) - 0.4, 0)
    return activations + 0.05 * rng.random((tokens, units)), rng.normal(size=(outputs, units))


def without(size, *removed):
    return np.setdiff1d(np.arange(size), removed)


def error(activations, weight, kept, repaired):
    return float(((activations @ weight.T - activations[:, kept] @ repaired.T) ** 2).sum())


def test_vanishing_ridge_equals_lstsq():
    activations, weight = relu_layer()
    kept = np.sort(np.random.default_rng(1).choice(24, 15, replace=False))
    expected = np.linalg.lstsq(activations[:, kept], activations @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(least_squares(weight, moments_of(activations), kept, 1e-13), expected, atol=1e-7)


def test_ridge_equals_the_stacked_least_squares_problem():
    activations, weight = relu_layer()
    kept = without(24, 2, 3, 5, 11)
    ridge = 0.03 * np.diagonal(activations.T @ activations)[kept].mean()
    # |A W^T - A_S V^T|^2 + r |V - W_S|^2: the ridge pulls to the weights there were
    rows = np.concatenate([activations[:, kept], np.sqrt(ridge) * np.eye(kept.size)])
    target = np.concatenate([activations @ weight.T, np.sqrt(ridge) * weight[:, kept].T])
    expected = np.linalg.lstsq(rows, target, rcond=None)[0].T
    np.testing.assert_allclose(least_squares(weight, moments_of(activations), kept, 0.03), expected, atol=1e-9)


@given(seed=st.integers(0, 9999), removed=st.integers(1, 20), ridge=st.sampled_from([1e-8, 1e-4, 1e-1, 10.0]))
@settings(deadline=None, max_examples=60)
def test_repair_is_never_worse_on_its_own_tokens(seed, removed, ridge):
    activations, weight = relu_layer(tokens=80, seed=seed)
    kept = np.sort(np.random.default_rng(seed).permutation(24)[removed:])
    repaired = least_squares(weight, moments_of(activations), kept, ridge)
    before = error(activations, weight, kept, weight[:, kept])
    assert error(activations, weight, kept, repaired) <= before * (1 + 1e-9) + 1e-12


def test_repair_helps_where_neurons_are_redundant():
    activations, weight = relu_layer(tokens=2000)
    kept = np.arange(16)
    repaired = least_squares(weight, moments_of(activations), kept, 1e-4)
    before = error(activations, weight, kept, weight[:, kept])
    assert error(activations, weight, kept, repaired) < 0.2 * before


def test_a_duplicate_leaves_at_no_cost():
    activations, weight = relu_layer()
    activations[:, 9] = activations[:, 4]
    kept = without(24, 9)
    repaired = least_squares(weight, moments_of(activations), kept, 1e-12)
    np.testing.assert_allclose(activations[:, kept] @ repaired.T, activations @ weight.T, atol=1e-8)
    expected = weight[:, kept].copy()
    expected[:, 4] += weight[:, 9]
    np.testing.assert_allclose(repaired, expected, atol=1e-8)


def test_a_linear_combination_leaves_at_no_cost():
    activations, weight = relu_layer()
    activations[:, 20] = 0.5 * activations[:, 1] + 2.0 * activations[:, 13]
    kept = without(24, 20)
    repaired = least_squares(weight, moments_of(activations), kept, 1e-12)
    np.testing.assert_allclose(activations[:, kept] @ repaired.T, activations @ weight.T, atol=1e-8)


def test_dead_neurons_change_nothing():
    activations, weight = relu_layer()
    activations[:, [3, 8]] = 0.0
    moments = moments_of(activations)
    np.testing.assert_array_equal(least_squares(weight, moments, without(24, 3), 1e-4), weight[:, without(24, 3)])
    kept = without(24, 5)  # dead ones among the survivors keep their column
    repaired = least_squares(weight, moments, kept, 1e-4)
    for dead in (3, 8):
        np.testing.assert_array_equal(repaired[:, kept == dead][:, 0], weight[:, dead])


def test_only_dead_survivors_keep_their_weights():
    activations, weight = relu_layer()
    activations[:, :12] = 0.0
    kept = np.arange(12)
    np.testing.assert_array_equal(least_squares(weight, moments_of(activations), kept, 1e-4), weight[:, kept])


def test_nothing_removed_changes_nothing():
    activations, weight = relu_layer()
    np.testing.assert_array_equal(least_squares(weight, moments_of(activations), np.arange(24), 1e-4), weight)


@pytest.mark.parametrize("tokens", [3, 12])
def test_fewer_tokens_than_neurons_stay_finite_and_never_worse(tokens):
    activations, weight = relu_layer(tokens=tokens)
    kept = np.arange(18)
    repaired = least_squares(weight, moments_of(activations), kept, 1e-4)
    assert np.isfinite(repaired).all()
    before = error(activations, weight, kept, weight[:, kept])
    assert error(activations, weight, kept, repaired) <= before
    # what the tokens never excite keeps what it had: the correction lies in the span of the tokens
    correction = repaired - weight[:, kept]
    unseen = np.linalg.svd(activations[:, kept])[2][tokens:]
    np.testing.assert_allclose(correction @ unseen.T, 0, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-4, 1e-9, 1e-12])
def test_rank_deficient_single_precision_moments_end_in_weights_or_a_numeric_error(ridge):
    rng = np.random.default_rng(0)
    activations = np.maximum(rng.normal(size=(100, 300)), 0)
    exact = moments_of(activations)
    stored = Moments(100, exact.total_N, exact.gram_NN.astype(np.float32).astype(np.float64))  # as the shards store it
    try:
        repaired = least_squares(rng.normal(size=(4, 300)), stored, np.arange(200), ridge)
    except NumericError:
        assert ridge < 1e-4  # the default must work
    else:
        assert np.isfinite(repaired).all()


def test_inputs_are_not_changed():
    activations, weight = relu_layer()
    moments = moments_of(activations)
    gram, before = moments.gram_NN.copy(), weight.copy()
    least_squares(weight, moments, np.arange(10), 1e-4)
    np.testing.assert_array_equal(moments.gram_NN, gram)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_an_error(bad):
    activations, weight = relu_layer()
    activations[5, 5] = bad
    with np.errstate(invalid="ignore"):
        moments = moments_of(activations)
    with pytest.raises(NumericError, match="NaN or infinite"):
        least_squares(weight, moments, np.arange(10), 1e-4)


def test_mean_bias_by_hand():
    activations = np.asarray([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]])
    weight = np.asarray([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    np.testing.assert_array_equal(mean_bias(weight, moments_of(activations), np.asarray([0])), [80.0, 160.0])
    np.testing.assert_array_equal(mean_bias(weight, moments_of(activations), np.asarray([1, 2])), [2.0, 4.0])
    np.testing.assert_array_equal(mean_bias(weight, moments_of(activations), np.arange(3)), [0.0, 0.0])


def test_mean_bias_leaves_no_mean_error():
    activations, weight = relu_layer()
    kept = np.arange(9)
    bias = mean_bias(weight, moments_of(activations), kept)
    difference = activations @ weight.T - (activations[:, kept] @ weight[:, kept].T + bias)
    np.testing.assert_allclose(difference.mean(axis=0), 0, atol=1e-12)


def products_of(signals, target):
    return Products(signals.T @ signals, signals.T @ target)


def test_a_refit_equals_the_stacked_least_squares_problem():
    activations, weight = relu_layer(units=9)
    target = np.random.default_rng(3).normal(size=(len(activations), 7))
    ridge = 0.02 * np.diagonal(activations.T @ activations).mean()
    rows = np.concatenate([activations, np.sqrt(ridge) * np.eye(9)])
    expected = np.linalg.lstsq(rows, np.concatenate([target, np.sqrt(ridge) * weight.T]), rcond=None)[0].T
    found = refit(weight, products_of(activations, target), None, 0.02)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_refit_to_what_the_weights_gave_is_the_local_repair():
    activations, weight = relu_layer()
    kept = without(24, 1, 4, 20)
    products = products_of(activations[:, kept], activations @ weight.T)
    found = refit(weight[:, kept], products, None, 1e-4)
    np.testing.assert_allclose(found, least_squares(weight, moments_of(activations), kept, 1e-4), atol=1e-9)


def test_the_ridge_is_the_one_that_predicts_held_out_tokens_best():
    activations, weight = relu_layer(tokens=60, units=20)
    rng = np.random.default_rng(5)
    target = activations @ weight.T + rng.normal(size=(60, 7))
    fitted, held = products_of(activations[:40], target[:40]), products_of(activations[40:], target[40:])
    found = refit(weight, fitted, held, 1e-4)
    tried = {ridge: refit(weight, fitted, None, ridge) for ridge in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)}
    errors = {ridge: float(((activations[40:] @ one.T - target[40:]) ** 2).sum()) for ridge, one in tried.items()}
    best = min(errors, key=errors.__getitem__)
    assert best > 1e-4, "noise is not worth learning"
    np.testing.assert_allclose(found, refit(weight, fitted + held, None, best), atol=1e-9)


def test_a_refit_on_a_device_is_that_of_the_host(library):
    activations, weight = relu_layer(tokens=60, units=20)
    target = activations @ weight.T + np.random.default_rng(5).normal(size=(60, 7))
    sums = products_of(activations[:40], target[:40]), products_of(activations[40:], target[40:])
    moved = [Products(*(arrays.to_device(one, library) for one in (each.gram_SS, each.cross_SD))) for each in sums]
    found = arrays.to_numpy(refit(arrays.to_device(weight, library), *moved, 1e-4))
    np.testing.assert_allclose(found, refit(weight, *sums, 1e-4), atol=1e-9)
    kept = without(20, 3, 4)
    expected = least_squares(weight, moments_of(activations), kept, 1e-4)
    np.testing.assert_allclose(least_squares(weight, moments_of(activations), kept, 1e-4, library), expected, atol=1e-9)


def test_smaller_ridges_are_tried_while_they_help(monkeypatch):
    activations, weight = relu_layer(tokens=60, units=20)
    target = activations @ weight.T + np.random.default_rng(5).normal(size=(60, 7))
    tried = []
    solve = arrays.solve_positive
    monkeypatch.setattr(arrays, "solve_positive", lambda *given: (tried.append(given), solve(*given))[1])
    refit(weight, products_of(activations[:40], target[:40]), products_of(activations[40:], target[40:]), 1e-4)
    assert 2 < len(tried) < 7, "the best, one that is worse, and the solution for all tokens"


def test_weights_that_nothing_improves_on_held_out_tokens_stay():
    activations, weight = relu_layer(tokens=60, units=20)
    target = activations @ weight.T
    wrong = products_of(activations[:40], np.random.default_rng(1).normal(size=(40, 7)) * 30)
    found = refit(weight, wrong, products_of(activations[40:], target[40:]), 1e-4)
    assert found is weight


def test_a_refit_refuses_what_is_not_finite():
    with pytest.raises(NumericError, match="NaN or infinite"):
        refit(np.ones((2, 2)), Products(np.eye(2), np.full((2, 2), np.inf)), None, 1e-4)
