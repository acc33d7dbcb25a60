"""What every method promises; a new method is a new row."""

import itertools
import pickle
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from cria_dist import methods
from cria_dist.errors import NumericError
from cria_dist.methods import (
    Activation,
    Conditional,
    Cria,
    Eigenvalue,
    Flap,
    Magnitude,
    Method,
    Random,
    Receding,
    Taylor,
    Wanda,
)
from cria_dist.records import Scores, Site
from cria_dist.stages.decide import select

METHODS = [
    Cria(),
    Cria(preset="recommended"),
    Cria(neighbours=4),
    Cria(eigenpairs=3),
    Cria(eigenpairs=500),
    Cria(spectrum="full"),
    Cria(output_weighting="product"),
    Cria(output_weighting="rank"),
    Cria(neighbour_guard=True),
    Cria(dead_first=True),
    Cria(drop_edges=0.2),
    Cria(spectrum="full", output_weighting="product", neighbour_guard=True, dead_first=True, neighbours=6),
    Conditional(),
    Conditional(ridge=0.1),
    Random(),
    Magnitude(),
    Activation(),
    Wanda(),
    Flap(),
    Taylor(),
    Taylor(sequences=8, shard_sequences=8),
    Eigenvalue(),
    Eigenvalue(variant="all", l1=0.0),
    Receding(),
    Receding(variant="all", opening=0.9, shift=3.0),
    Receding(scaling="batch_norm", shift=3.0),
]
FIELDS = {
    "signals": ("input_NM", "output_NM"),
    "moments": ("moments",),
    "weights": ("weight_norm_N", "output_norm_N", "output_DN"),
    "gradients": ("taylor_N",),
    "gates": ("gate_N",),
}
ADAPTER = TypeAdapter(Method)
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def test_every_method_has_a_row():
    union = get_args(get_args(Method)[0])
    assert {type(method) for method in METHODS} == {cls for cls in union if cls.unit == "mlp"}
    assert {cls.__name__ for cls in union} <= set(methods.__all__)


@every_method
@pytest.mark.parametrize("dead", [(), (3, 17, 40)])
def test_scores_are_one_number_per_unit(method, dead, make_statistics):
    verdict = method.score(make_statistics(dead=dead))
    assert verdict.keep_N.shape == (64,)
    assert np.issubdtype(verdict.keep_N.dtype, np.floating)
    assert (np.isfinite(verdict.keep_N) | np.isneginf(verdict.keep_N)).all()
    assert np.isfinite(verdict.keep_N).sum() >= 61
    assert len(np.unique(verdict.keep_N)) > 30  # a ranking, not a constant
    assert all(isinstance(name, str) and isinstance(value, float) for name, value in verdict.facts.items())


@every_method
def test_edges_and_spectrum_fit_their_records(method, make_statistics):
    verdict = method.score(make_statistics(dead=(5,)))
    if verdict.edges_E2 is not None:
        assert verdict.edges_E2.dtype == np.int32
        assert verdict.edges_E2.shape[1] == 2
        assert verdict.edges_E2.min() >= 0
        assert verdict.edges_E2.max() < 64
        assert (verdict.edges_E2[:, 0] < verdict.edges_E2[:, 1]).all()
    if verdict.spectrum is not None:
        assert verdict.spectrum.values_K.dtype == np.float64
        assert (verdict.spectrum.values_K > 0).all()
        assert (np.diff(verdict.spectrum.values_K) <= 1e-12).all()


@every_method
def test_the_same_statistics_give_the_same_bytes(method, make_statistics):
    first, second = method.score(make_statistics(dead=(5,))), method.score(make_statistics(dead=(5,)))
    assert first.keep_N.tobytes() == second.keep_N.tobytes()
    assert dict(first.facts) == dict(second.facts)


@every_method
def test_scoring_leaves_the_statistics_alone(method, make_statistics):
    statistics, untouched = make_statistics(dead=(5,)), make_statistics(dead=(5,))
    method.score(statistics)
    for name in ("input_NM", "output_NM", "weight_norm_N", "output_norm_N", "output_DN", "taylor_N", "gate_N"):
        np.testing.assert_array_equal(getattr(statistics, name), getattr(untouched, name))
    np.testing.assert_array_equal(statistics.moments.gram_NN, untouched.moments.gram_NN)


@every_method
def test_needs_is_all_it_reads(method, make_statistics):
    statistics = make_statistics()
    unused = {name: None for need, names in FIELDS.items() if need not in method.needs for name in names}
    bare = method.score(replace(statistics, **unused))
    np.testing.assert_array_equal(bare.keep_N, method.score(statistics).keep_N)


@every_method
def test_what_it_needs_and_does_not_get_is_a_numeric_error(method, make_statistics):
    for need in method.needs:
        missing = replace(make_statistics(), **dict.fromkeys(FIELDS[need]))
        with pytest.raises(NumericError, match="need"):
            method.score(missing)


@every_method
def test_survives_pickle_and_json(method, make_statistics):
    assert pickle.loads(pickle.dumps(method)) == method
    again = ADAPTER.validate_json(ADAPTER.dump_json(method))
    assert again == method
    assert type(again) is type(method)
    assert ADAPTER.dump_json(again) == ADAPTER.dump_json(method)
    statistics = make_statistics()
    assert again.score(statistics).keep_N.tobytes() == method.score(statistics).keep_N.tobytes()


@every_method
def test_names_its_paper_and_itself(method):
    assert method.paper.startswith("https://arxiv.org/abs/")
    assert method.title
    assert method.title.startswith(method.name)
    assert method.unit == "mlp"
    assert (type(method).__doc__ or "").strip()


@every_method
def test_is_frozen_and_knows_no_other_fields(method):
    with pytest.raises(ValidationError):
        method.name = "other"
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"name": method.name, "no_such_option": 1})


def test_an_unknown_method_is_a_validation_error():
    with pytest.raises(ValidationError, match="magnitude"):
        ADAPTER.validate_python({"name": "best"})


@every_method
def test_a_larger_budget_takes_what_a_smaller_one_took(method, make_statistics):
    verdict = method.score(make_statistics(dead=(5,)))
    scores = Scores(Site(0), verdict.keep_N, np.ones(64, dtype=np.int64), verdict.edges_E2)
    kept = [set(select(scores, width)) for width in (63, 56, 48, 40)]
    assert [len(one) for one in kept] == [63, 56, 48, 40]
    assert all(smaller < larger for larger, smaller in itertools.pairwise(kept))
