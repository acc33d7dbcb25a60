"""What a method that removes single weights promises. Shapes: O outputs, I inputs."""

import pickle
from typing import get_args

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from cria_dist.methods import Method, SpectrumPreserving

METHODS = [SpectrumPreserving(), SpectrumPreserving(truncate=1), SpectrumPreserving(truncate=0, rescale=True)]
ADAPTER = TypeAdapter(Method)
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(24, 36))


def test_every_method_has_a_row() -> None:
    union = get_args(get_args(Method)[0])
    assert {type(method) for method in METHODS} == {cls for cls in union if cls.unit == "weight"}
    assert len({method.title for method in METHODS}) == len(METHODS)


@every_method
@pytest.mark.parametrize("zeros", [1, 400, 863])
def test_sparsify_hits_the_number_and_leaves_its_input_alone(method: SpectrumPreserving, zeros: int) -> None:
    weight_OI = weight()
    found = method.sparsify(weight_OI, zeros, seed=5)
    assert np.count_nonzero(found == 0) == zeros
    np.testing.assert_array_equal(weight_OI, weight())
    np.testing.assert_array_equal(found, method.sparsify(weight(), zeros, seed=5))
    stays = found != 0
    factor = found[stays] / weight_OI[stays]
    assert (factor >= 1 - 1e-12).all()
    assert factor.max() <= (4 + 1e-12 if method.rescale else 1)


def test_truncate_of_one_is_pruning_by_magnitude() -> None:
    weight_OI = weight()
    expected = np.where(np.abs(weight_OI) >= np.sort(np.abs(weight_OI), axis=None)[400], weight_OI, 0)
    np.testing.assert_array_equal(SpectrumPreserving(truncate=1).sparsify(weight_OI, 400, seed=1), expected)


def test_between_the_limits_only_chance_decides() -> None:
    """Small weights go in any case, large ones stay in any case, and the seed matters for the others."""
    weight_OI = weight()
    order = np.argsort(np.abs(weight_OI), axis=None)
    zeros = np.stack(
        [SpectrumPreserving(truncate=0.5).sparsify(weight_OI, 400, seed).ravel() == 0 for seed in range(20)]
    )
    assert zeros[:, order[:200]].all()
    assert not zeros[:, order[-150:]].any()
    often = zeros[:, order[200:600]].mean(axis=0)
    assert ((often > 0) & (often < 1)).mean() > 0.8


@every_method
def test_names_its_paper_its_unit_and_its_needs(method: SpectrumPreserving) -> None:
    assert method.paper == "https://arxiv.org/abs/2307.08982"
    assert method.title.startswith(method.name)
    assert method.unit == "weight"
    assert method.needs == {"weights"}
    assert (type(method).__doc__ or "").strip()


@every_method
def test_survives_pickle_and_json(method: SpectrumPreserving) -> None:
    assert pickle.loads(pickle.dumps(method)) == method
    assert ADAPTER.validate_json(ADAPTER.dump_json(method)) == method


@pytest.mark.parametrize("changes", [{"truncate": -0.1}, {"truncate": 1.5}, {"no_such_option": 1}])
def test_bounds_and_unknown_fields(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"name": "spectrum_preserving", **changes})
