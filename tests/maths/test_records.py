"""Records: moments add up, plans and sites survive their text form."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cria_dist.records import Moments, PruningPlan, Site


def moments_of(activations_TN):
    return Moments(len(activations_TN), activations_TN.sum(axis=0), activations_TN.T @ activations_TN)


@given(cuts=st.lists(st.integers(1, 49), max_size=4, unique=True), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_moments_of_the_parts_are_moments_of_the_whole(cuts, seed):
    activations = np.random.default_rng(seed).normal(2.0, 3.0, size=(50, 6))
    parts = [moments_of(part) for part in np.split(activations, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    whole = moments_of(activations)
    assert merged.count == whole.count == 50
    np.testing.assert_allclose(merged.total_N, whole.total_N, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(merged.gram_NN, whole.gram_NN, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(merged.mean_N, activations.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.std_N, activations.std(axis=0), rtol=1e-10)


def test_deviation_of_a_constant_is_zero_not_nan():
    activations = np.full((1000, 3), [0.1, 1e4 / 3, 0.0])
    deviation = moments_of(activations).std_N
    assert np.isfinite(deviation).all()
    np.testing.assert_allclose(deviation, 0, atol=1e-3)
    assert deviation[2] == 0


indices = st.sets(st.integers(0, 5000), min_size=1, max_size=20).map(lambda chosen: tuple(sorted(chosen)))
site_keys = st.builds(Site, st.integers(0, 999), st.sampled_from(["mlp", "attention", "mlp.experts.3"])).map(
    lambda site: site.key
)
plans = st.builds(
    PruningPlan,
    kept=st.dictionaries(site_keys, indices, max_size=5),
    widths=st.dictionaries(site_keys, st.integers(1, 60_000), max_size=5),
    method=st.text(max_size=20),
    ratio=st.floats(0, 1),
    parameters=st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)),
    digest=st.text("0123456789abcdef", max_size=64),
)


@given(plan=plans)
@settings(deadline=None)
def test_plan_survives_json(plan):
    text = plan.to_json()
    again = PruningPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert text.endswith("\n")
    assert "\n" not in text[:-1]
    assert json.loads(text)["schema"] == 1
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_equal_plans_have_equal_bytes():
    kept = {"layer-000.mlp": (0, 2), "layer-001.mlp": (1,)}
    widths = {"layer-000.mlp": 3, "layer-001.mlp": 2}

    def plan(order):
        return PruningPlan(
            {key: kept[key] for key in order}, {key: widths[key] for key in order}, "m", 0.5, (4, 2), "d"
        )

    forward, backward = plan(list(kept)), plan(list(kept)[::-1])
    assert forward == backward
    assert forward.to_json() == backward.to_json()
    other = PruningPlan({**kept, "layer-001.mlp": (0,)}, widths, "m", 0.5, (4, 2), "d")
    assert other.to_json() != forward.to_json()


@given(layer=st.integers(0, 10_000), part=st.sampled_from(["mlp", "attention", "mlp.experts.3", "a-b"]))
def test_site_survives_its_key(layer, part):
    site = Site(layer, part)
    assert Site.from_key(site.key) == site


def test_keys_sort_like_layers():
    sites = [Site(layer) for layer in (0, 2, 9, 10, 99, 100, 999)]
    assert sorted(site.key for site in reversed(sites)) == [site.key for site in sites]
    assert sites[0] < sites[1] < sites[-1]
    assert Site(7).key == "layer-007.mlp"


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        Site(1).layer = 2
