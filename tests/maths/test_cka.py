"""Unbiased CKA against the definition, by hand, and under what must not change it."""

import array_api_strict as strict
import numpy as np
import pytest

from cria_dist import arrays
from cria_dist.errors import NumericError
from cria_dist.maths import cka


def states_of(layers: int = 4, tokens: int = 24, seed: int = 0) -> list[np.ndarray]:
    """A walk: each representation is the one before it and something new; widths differ."""
    rng = np.random.default_rng(seed)
    states = [rng.standard_t(4, size=(tokens, 10))]
    for _ in range(layers - 1):
        states.append(states[-1] + 0.7 * rng.normal(size=(tokens, 10)))
    states[-1] = np.hstack([states[-1], rng.normal(size=(tokens, 3))])
    return [state.astype(np.float32) for state in states]


def by_definition(x_TD: np.ndarray, y_TD: np.ndarray) -> float:
    """Song et al. 2012, equation 5, with traces and vectors of ones."""
    k, el = (state.astype(np.float64) @ state.astype(np.float64).T for state in (x_TD, y_TD))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(el, 0)
    n, ones = len(k), np.ones(len(k))
    total = np.trace(k @ el) + (ones @ k @ ones) * (ones @ el @ ones) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (ones @ k @ el @ ones)) / (n * (n - 3))


def test_by_hand():
    """Four tokens on a line, at 0 0 1 1 and at 0 1 0 1."""
    x, y = np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([[0.0], [1.0], [0.0], [1.0]])
    # with the mean taken off, products are 1/4 within a half and -1/4 between; row sums without the diagonal: -1/4;
    # so each of the 12 entries gets +1/8 +1/8 for its row and column, and -1 / (3 * 2) for the total of -1
    within, between = 1 / 4 + 1 / 4 - 1 / 6, -1 / 4 + 1 / 4 - 1 / 6
    own = (4 * within**2 + 8 * between**2) / (4 * 1)
    # the halves of x and y differ: 4 entries are within x, 4 within y, 4 within neither
    cross = (8 * within * between + 4 * between**2) / (4 * 1)
    np.testing.assert_allclose(cka.unbiased_hsic([x, y]), [[own, cross], [cross, own]], rtol=1e-14)
    np.testing.assert_allclose(cka.alignment(cka.unbiased_hsic([x, y])), [[1, -0.5], [-0.5, 1]], rtol=1e-14)


@pytest.mark.parametrize("tokens", [4, 5, 24])
def test_equals_the_definition(tokens):
    states = states_of(tokens=tokens)
    expected = [[by_definition(x, y) for y in states] for x in states]
    np.testing.assert_allclose(cka.unbiased_hsic(states), expected, rtol=1e-9, atol=1e-12)


def test_is_unbiased_over_all_pairs_of_permutations():
    """Of independent representations the mean over shuffles is zero; the biased estimate's is not."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 6))
    unbiased, biased = [], []
    for _ in range(4000):
        shuffled = y[rng.permutation(8)]
        unbiased.append(cka.unbiased_hsic([x, shuffled])[0, 1])
        gram_x, gram_y = ((one - one.mean(0)) @ (one - one.mean(0)).T for one in (x, shuffled))
        biased.append((gram_x * gram_y).sum() / 49)
    error = np.std(unbiased) / np.sqrt(4000)
    assert abs(np.mean(unbiased)) < 4 * error
    assert np.mean(biased) > 20 * error


def test_the_same_representation_is_one():
    x = states_of(1)[0]
    np.testing.assert_allclose(cka.alignment(cka.unbiased_hsic([x, x])), np.ones((2, 2)), rtol=1e-12)


def test_rotation_scale_and_shift_change_nothing():
    states = states_of()
    rng = np.random.default_rng(3)
    turned = []
    for state in states:
        rotation = np.linalg.qr(rng.normal(size=(state.shape[1], state.shape[1])))[0]
        turned.append(float(rng.uniform(0.1, 50)) * state.astype(np.float64) @ rotation + 100 * rng.normal(size=1))
    np.testing.assert_allclose(
        cka.alignment(cka.unbiased_hsic(turned)), cka.alignment(cka.unbiased_hsic(states)), rtol=1e-8, atol=1e-10
    )


def test_minibatches_add_up_as_ratios_of_sums():
    batches = [states_of(seed=seed) for seed in range(3)]
    total = sum(cka.unbiased_hsic(batch) for batch in batches)
    own = [[sum(by_definition(b[i], b[j]) for b in batches) for j in range(4)] for i in range(4)]
    expected = [[own[i][j] / np.sqrt(own[i][i] * own[j][j]) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(cka.alignment(total), expected, rtol=1e-9)
    found = cka.alignment(total)[0]
    assert (np.diff(found) < 0).all(), "a walk becomes less and less like its beginning"


def test_needs_only_the_array_api():
    states = states_of()
    found = cka.unbiased_hsic([strict.asarray(state) for state in states])
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, cka.unbiased_hsic(states), rtol=1e-12, atol=1e-13)
    assert arrays.namespace(found).__name__.endswith("numpy")


def test_too_few_tokens_and_constant_or_broken_states_are_errors():
    with pytest.raises(NumericError, match="needs 4 tokens in a minibatch and there are 3"):
        cka.unbiased_hsic(states_of(tokens=3))
    states = states_of()
    with pytest.raises(NumericError, match="after layer 1 are the same for all tokens"):
        cka.alignment(cka.unbiased_hsic([states[0], np.ones((24, 5), dtype=np.float32)]))
    states[2][3, 1] = np.nan
    with pytest.raises(NumericError, match="after layer 2 are not finite"):
        cka.unbiased_hsic(states)
