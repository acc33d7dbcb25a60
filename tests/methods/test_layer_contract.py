"""What every method that removes whole layers promises; a new method is a new row. Shapes: T tokens, L layers."""

import pickle
from typing import get_args

import array_api_strict as strict
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from cria_dist.errors import NumericError
from cria_dist.methods import BlockInfluence, Method, MPruner

METHODS = [BlockInfluence(), MPruner(), MPruner(tau=0.5), MPruner(minibatch=8), MPruner(stop="loss", tau=0.3)]
ADAPTER = TypeAdapter(Method)
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)
LAYERS = 7


def states_of(seed: int = 0, tokens: int = 30, layers: int = LAYERS) -> list[np.ndarray]:
    """A residual stream: L + 1 states, some layers add much and some little."""
    rng = np.random.default_rng(seed)
    states = [rng.normal(size=(tokens, 12))]
    for layer in range(layers):
        states.append(states[-1] + (0.05, 0.6, 0.2)[layer % 3] * rng.normal(size=(tokens, 12)))
    return [state.astype(np.float32) for state in states]


def total_of(method, sequences: int = 3):
    return sum(method.measure(states_of(seed)) for seed in range(sequences))


def test_every_method_has_a_row():
    union = get_args(get_args(Method)[0])
    assert {type(method) for method in METHODS} == {cls for cls in union if cls.unit == "layer"}


@every_method
def test_scores_are_one_number_per_layer(method):
    verdict = method.judge(total_of(method))
    assert verdict.keep_N.shape == (LAYERS,)
    assert np.isfinite(verdict.keep_N).all()
    assert len(np.unique(verdict.keep_N)) > LAYERS // 2


@every_method
def test_any_number_of_layers_can_go_but_the_last(method):
    total = total_of(method)
    for count in range(LAYERS):
        removed = method.removed(total, count)
        assert len(set(removed)) == count
        assert list(removed) == sorted(removed)
        assert set(removed) <= set(range(LAYERS))


@every_method
def test_the_same_states_give_the_same_bytes_and_stay_as_they_are(method):
    states, untouched = states_of(), states_of()
    assert method.measure(states).tobytes() == method.measure(states_of()).tobytes()
    for state, same in zip(states, untouched, strict=True):
        np.testing.assert_array_equal(state, same)


@every_method
def test_sums_are_float64_on_the_host_whatever_the_library(method):
    found = method.measure([strict.asarray(state) for state in states_of()])
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, method.measure(states_of()), rtol=1e-10, atol=1e-12)


@every_method
def test_the_fewest_tokens_are_enough(method):
    for tokens in range(method.fewest_tokens, 40):
        assert np.isfinite(method.measure(states_of(tokens=tokens))).all()


@every_method
def test_states_without_variation_or_length_are_a_numeric_error(method):
    states = states_of()
    states[3] = np.zeros_like(states[3])
    with pytest.raises(NumericError, match="layer 2"):
        method.judge(method.measure(states))


@every_method
def test_survives_pickle_and_json(method):
    assert pickle.loads(pickle.dumps(method)) == method
    again = ADAPTER.validate_json(ADAPTER.dump_json(method))
    assert again == method
    assert type(again) is type(method)


@every_method
def test_names_its_paper_its_unit_and_its_needs(method):
    assert method.paper.startswith("https://arxiv.org/abs/")
    assert method.title.startswith(method.name)
    assert method.unit == "layer"
    assert method.needs == {"hidden"}
    assert (type(method).__doc__ or "").strip()


@every_method
def test_who_has_a_tolerance_has_attempts(method):
    if method.tolerance is None:
        assert method.held_out_share == 0
        return
    assert 0 < method.held_out_share < 1
    attempts = method.attempts(total_of(method), 4)
    assert attempts
    assert all(len(one) <= 4 for one in attempts)


@every_method
def test_is_frozen_and_knows_no_other_fields(method):
    with pytest.raises(ValidationError):
        method.name = "other"
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"name": method.name, "no_such_option": 1})


# block influence by hand


def test_block_influence_by_hand():
    """Layer 0 turns one of two tokens by a right angle, layer 1 doubles all, layer 2 turns everything around."""
    start = np.array([[1, 0], [0, 3]], dtype=np.float32)
    turned = np.array([[0, 1], [0, 3]], dtype=np.float32)
    states = [start, turned, 2 * turned, -turned]
    method = BlockInfluence()
    np.testing.assert_allclose(method.judge(method.measure(states)).keep_N, [0.5, 0, 2], atol=1e-15)
    assert method.removed(method.measure(states), 2) == (0, 1)


def test_block_influence_is_over_tokens_not_over_sequences():
    method = BlockInfluence()
    long, short = states_of(0, tokens=30, layers=1), states_of(1, tokens=2, layers=1)
    joined = [np.vstack(pair) for pair in zip(long, short, strict=True)]
    apart = method.judge(method.measure(long) + method.measure(short)).keep_N
    np.testing.assert_allclose(apart, method.judge(method.measure(joined)).keep_N, rtol=1e-12)


# mpruner by hand

SIMILARITY = np.array(
    [
        [1.00, 0.99, 0.985, 0.90, 0.80],
        [0.99, 1.00, 0.990, 0.95, 0.85],
        [0.985, 0.99, 1.00, 0.97, 0.90],
        [0.90, 0.95, 0.970, 1.00, 0.99],
        [0.80, 0.85, 0.900, 0.99, 1.00],
    ]
)
"""At 0.98: 0 1 2 | 3 4. As sums it is its own CKA, for its diagonal is one."""


def test_mpruner_by_hand():
    method = MPruner()
    np.testing.assert_allclose(method.judge(SIMILARITY).keep_N, [2, 0.01, 0.015, 0.1, 0.01])
    assert [method.removed(SIMILARITY, count) for count in range(4)] == [(), (4,), (1, 4), (1, 2, 4)]
    assert method.removed(SIMILARITY, 4) == (1, 2, 3, 4), "tau goes down to 0.8, where all are like the first"


def test_mpruner_lowers_tau_no_further_than_needed():
    strict_one = MPruner(tau=0.995)
    assert strict_one.removed(SIMILARITY, 1) == (4,)  # at 0.99: 0 1 | 2 | 3 4, and 4 is as similar as 1 and later
    assert strict_one.removed(SIMILARITY, 2) == (1, 4)
    assert strict_one.removed(SIMILARITY, 3) == (1, 2, 4)


def test_mpruner_tries_the_granularities_of_the_paper():
    method = MPruner(stop="loss", tau=0.8)
    assert method.attempts(SIMILARITY, 9) == ((1, 2, 3, 4), (1, 3), (1, 4))
    assert method.attempts(SIMILARITY, 2) == ((1, 2), (1, 3), (1, 4))
    assert MPruner(stop="loss", tau=0.995).attempts(SIMILARITY, 9) == ((), (), ())


def test_mpruner_leaves_the_embedding_out_and_cuts_long_sequences_evenly():
    states = states_of(tokens=20)
    changed = [100 * states[0], *states[1:]]
    np.testing.assert_array_equal(MPruner().measure(states), MPruner().measure(changed))
    halves = [[state[part] for state in states] for part in (slice(0, 10), slice(10, 20))]
    expected = sum(MPruner().measure(half) for half in halves)
    np.testing.assert_allclose(MPruner(minibatch=17).measure(states), expected, rtol=1e-13)
