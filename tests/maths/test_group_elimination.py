"""Groups leave in the order of explicit refitting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist.errors import NumericError
from cria_dist.maths.elimination import eliminate
from cria_dist.maths.group_elimination import eliminate_groups


def layer(groups=5, span=3, tokens=200, seed=0):
    rng = np.random.default_rng(seed)
    size = groups * span
    signals_TN = rng.normal(size=(tokens, 6)) @ rng.normal(size=(6, size)) + 0.3 * rng.normal(size=(tokens, size))
    return signals_TN.T @ signals_TN, rng.normal(size=(7, size))


def refitted_error(gram, weight, kept, shift):
    """Least of ``|A W^T - A_S V^T|^2 + r |W - V|^2``, the columns of removed signals in V being zero."""
    hessian = gram + shift * np.eye(len(gram))
    cross = weight @ hessian
    fit = np.linalg.solve(hessian[np.ix_(kept, kept)], cross[:, kept].T).T if len(kept) else np.zeros((7, 0))
    return float((weight * cross).sum() - (fit * cross[:, kept]).sum())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 6), span=st.integers(1, 4))
def test_the_order_and_the_costs_are_those_of_explicit_refitting(seed, groups, span):
    gram, weight = layer(groups, span, seed=seed)
    shift = 1e-3 * np.trace(gram) / len(gram)
    kept, error, order, costs = list(range(groups)), 0.0, [], []
    for _ in range(groups):
        errors = []
        for group in kept:
            signals = [other * span + place for other in kept if other != group for place in range(span)]
            errors.append(refitted_error(gram, weight, signals, shift))
        best = int(np.argmin(errors))
        order.append(kept.pop(best))
        costs.append(errors[best] - error)
        error = errors[best]
    found = eliminate_groups(gram, weight, span, 1e-3)
    assert found.order_N.tolist() == order
    np.testing.assert_allclose(found.cost_N, costs, rtol=1e-6)


def test_groups_of_one_are_neurons():
    gram, weight = layer(groups=12, span=1)
    single, grouped = eliminate(gram, weight, 1e-3), eliminate_groups(gram, weight, 1, 1e-3)
    np.testing.assert_array_equal(single.order_N, grouped.order_N)
    np.testing.assert_allclose(single.cost_N, grouped.cost_N, rtol=1e-8)


def test_a_copied_group_goes_first_and_at_no_cost():
    gram, weight = layer()
    copied = np.r_[np.arange(15), [6, 7, 8]]
    split = weight[:, copied].copy()
    split[:, 6:9] /= 2
    split[:, 15:18] /= 2
    found = eliminate_groups(gram[np.ix_(copied, copied)], split, 3, 1e-9)
    assert found.order_N[0] in (2, 5)
    assert found.cost_N[0] < 1e-6 * found.cost_N[1]


def test_signals_must_be_whole_groups():
    gram, weight = layer()
    with pytest.raises(NumericError, match="15 signals are not groups of 4"):
        eliminate_groups(gram, weight, 4, 1e-3)
