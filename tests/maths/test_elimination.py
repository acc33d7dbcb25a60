"""Greedy elimination against the same greedy by explicit refitting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist.errors import NumericError
from cria_dist.maths import elimination
from cria_dist.maths.elimination import eliminate


def layer(tokens=400, units=40, outputs=9, seed=0):
    """Gram matrix of correlated non-negative signals, and a map that reads them."""
    rng = np.random.default_rng(seed)
    signals_TN = np.maximum(rng.normal(size=(tokens, 12)) @ rng.normal(size=(12, units)), 0)
    signals_TN += 0.1 * rng.random((tokens, units))
    return signals_TN.T @ signals_TN, rng.normal(size=(outputs, units))


def refitted_error(gram, weight, kept, shift):
    """Least of ``|A W^T - A_S V^T|^2 + r |W - V|^2``, the columns of removed units in V being zero."""
    hessian = gram + shift * np.eye(len(gram))
    cross = weight @ hessian
    fit = np.linalg.solve(hessian[np.ix_(kept, kept)], cross[:, kept].T).T
    return float((weight * cross).sum() - (fit * cross[:, kept]).sum())


def greedy(gram, weight, shift, count):
    """One unit at a time, each choice by refitting once per unit that is left."""
    kept, order, costs, error = list(range(len(gram))), [], [], 0.0
    for _ in range(count):
        errors = [refitted_error(gram, weight, [u for u in kept if u != unit], shift) for unit in kept]
        best = int(np.argmin(errors))
        order.append(kept.pop(best))
        costs.append(errors[best] - error)
        error = errors[best]
    return order, costs


@pytest.mark.parametrize("block", [1, 5, 32])
def test_the_order_is_that_of_explicit_refitting(block, monkeypatch):
    monkeypatch.setattr(elimination, "BLOCK", block)
    monkeypatch.setattr(elimination, "CANDIDATES", 40)  # all units: exact
    gram, weight = layer()
    order, costs = greedy(gram, weight, 1e-3 * np.trace(gram) / 40, 30)
    found = eliminate(gram, weight, 1e-3)
    np.testing.assert_array_equal(found.order_N[:30], order)
    np.testing.assert_allclose(found.cost_N[:30], costs, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(found.order_N), np.arange(40))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), ridge=st.sampled_from([1e-5, 1e-3, 0.1]))
def test_costs_add_up_to_the_refitted_error(seed, ridge):
    gram, weight = layer(seed=seed)
    found = eliminate(gram, weight, ridge)
    shift = ridge * np.trace(gram) / 40
    for count in (1, 17, 39, 40):
        kept = np.setdiff1d(np.arange(40), found.order_N[:count])
        expected = refitted_error(gram, weight, kept, shift)
        assert found.cost_N[:count].sum() == pytest.approx(expected, rel=1e-6)


def test_few_candidates_cost_little(monkeypatch):
    gram, weight = layer(units=200, tokens=600)
    exact, half = [], 100
    for block, candidates in ((1, 200), (32, 4)):
        monkeypatch.setattr(elimination, "BLOCK", block)
        monkeypatch.setattr(elimination, "CANDIDATES", candidates)
        exact.append(eliminate(gram, weight, 1e-3).cost_N[:half].sum())
    assert exact[0] <= exact[1] * (1 + 1e-9)
    assert exact[1] <= 1.02 * exact[0]


def test_copies_go_first_and_at_no_cost():
    gram, weight = layer()
    copied = np.r_[np.arange(40), [3, 7, 7]]
    whole = gram[np.ix_(copied, copied)]
    split = weight[:, copied].copy()
    split[:, [3, 40]] *= 0.5
    split[:, [7, 41, 42]] /= 3
    found = eliminate(whole, split, 1e-6)
    groups = [3 if unit in (3, 40) else 7 if unit in (7, 41, 42) else -unit for unit in found.order_N[:3].tolist()]
    assert sorted(groups) == [3, 7, 7]
    assert found.cost_N[:3].sum() < 1e-4 * found.cost_N[3]


def test_silent_units_go_at_no_cost():
    gram, weight = layer()
    gram[[5, 9]] = 0
    gram[:, [5, 9]] = 0
    found = eliminate(gram, weight, 1e-6)
    assert set(found.order_N[:2].tolist()) == {5, 9}


def test_a_site_that_never_fires_has_an_order():
    found = eliminate(np.zeros((6, 6)), np.ones((3, 6)), 1e-3)
    np.testing.assert_array_equal(np.sort(found.order_N), np.arange(6))


def test_a_common_rotation_of_the_outputs_changes_nothing():
    gram, weight = layer()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0]
    rotated = eliminate(gram, rotation @ weight, 1e-3)
    np.testing.assert_array_equal(rotated.order_N, eliminate(gram, weight, 1e-3).order_N)


def test_units_may_be_in_any_order():
    gram, weight = layer()
    shuffle = np.random.default_rng(2).permutation(40)
    found = eliminate(gram[np.ix_(shuffle, shuffle)], weight[:, shuffle], 1e-3)
    np.testing.assert_array_equal(shuffle[found.order_N], eliminate(gram, weight, 1e-3).order_N)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_gram_matrix_is_refused(value):
    gram, weight = layer()
    gram[3, 4] = value
    with pytest.raises(NumericError, match="NaN or infinite"):
        eliminate(gram, weight, 1e-3)


def test_a_ridge_that_is_lost_in_rounding_is_refused():
    gram = np.ones((8, 8))
    with pytest.raises(NumericError, match=r"singular at ridge 1e-20.*raise"):
        eliminate(gram, np.ones((2, 8)), 1e-20)
