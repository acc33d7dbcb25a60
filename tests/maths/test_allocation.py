"""Budgets in exact arithmetic."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cria_dist.errors import PlanError
from cria_dist.maths.allocation import uniform_widths, units_ratio_for_parameters, width_after_round

ratios = st.integers(1, 999).map(lambda permille: Fraction(permille, 1000))
site_widths = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 20_000), min_size=1)


def test_uniform_widths_by_hand():
    assert uniform_widths({"a": 1536, "b": 1000}, 0.25, 8) == {"a": 1152, "b": 744}
    assert uniform_widths({"a": 1536}, 0.3, 1) == {"a": 1075}


@pytest.mark.parametrize("width", [10, 100, 1000, 1536])
def test_every_percentage_is_exact_in_spite_of_binary_fractions(width):
    for percent in range(1, 90):
        assert uniform_widths({"a": width}, percent / 100, 1) == {"a": width * (100 - percent) // 100}


@given(widths=site_widths, ratio=ratios, multiple=st.sampled_from([1, 2, 8, 16, 64]))
@settings(deadline=None, max_examples=300)
def test_uniform_widths_are_the_largest_multiple_that_removes_enough(widths, ratio, multiple):
    exact = {key: int(width * (1 - ratio)) // multiple * multiple for key, width in widths.items()}
    assume(all(width >= multiple for width in exact.values()))
    assert uniform_widths(widths, float(ratio), multiple) == exact


@given(widths=site_widths, ratio=ratios, multiple=st.sampled_from([1, 8, 64]), floor=st.integers(1, 3000))
@settings(deadline=None, max_examples=200)
def test_no_site_ever_goes_below_its_floor(widths, ratio, multiple, floor):
    smallest = dict.fromkeys(widths, floor)
    exact = {key: int(width * (1 - ratio)) // multiple * multiple for key, width in widths.items()}
    if min(exact.values()) >= floor:
        assert uniform_widths(widths, float(ratio), multiple, smallest) == exact
    else:
        with pytest.raises(PlanError):
            uniform_widths(widths, float(ratio), multiple, smallest)


def test_an_emptied_site_names_value_rule_and_remedy():
    with pytest.raises(PlanError) as caught:
        uniform_widths({"layer-000.mlp": 64, "layer-001.mlp": 12}, 0.4, 8)
    message = str(caught.value)
    assert "prune.ratio=0.4 leaves 0 of 12 units at layer-001.mlp" in message
    assert "at least 8 must stay" in message
    assert "lower prune.ratio or prune.multiple=8" in message


def test_a_site_below_its_floor_names_the_floor():
    with pytest.raises(PlanError, match=r"leaves 32 of 64 units at a; at least 33 must stay: lower prune\.ratio"):
        uniform_widths({"a": 64}, 0.5, 8, {"a": 33})


@given(
    widths=site_widths,
    costs=st.tuples(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000)),
    rest=st.integers(0, 10_000_000),
    ratio=ratios,
)
@settings(deadline=None, max_examples=200)
def test_the_share_of_units_removes_the_share_of_parameters(widths, costs, rest, ratio):
    unit_cost = dict(zip(widths, costs, strict=False))
    prunable = sum(widths[key] * unit_cost[key] for key in widths)
    dense = prunable + rest
    if ratio * dense >= prunable:
        with pytest.raises(PlanError):
            units_ratio_for_parameters(widths, unit_cost, dense, float(ratio))
        return
    share = units_ratio_for_parameters(widths, unit_cost, dense, float(ratio))
    assert share == pytest.approx(float(ratio * dense / prunable), rel=1e-12)
    try:
        kept = uniform_widths(widths, share, 1)
    except PlanError:
        return
    removed = sum((widths[key] - kept[key]) * unit_cost[key] for key in widths)
    wanted = float(ratio * dense)
    assert wanted * (1 - 1e-6) <= removed <= wanted + sum(unit_cost.values())


def test_more_than_the_prunable_units_hold_names_value_rule_and_remedy():
    with pytest.raises(PlanError) as caught:
        units_ratio_for_parameters({"a": 10, "b": 20}, {"a": 100, "b": 50}, 10_000, 0.2)
    message = str(caught.value)
    assert "prune.ratio=0.2 of all 10,000 parameters is more than the prunable units hold" in message
    assert "(2,000, 20.0%)" in message
    assert "lower prune.ratio" in message


def test_a_model_without_prunable_units_is_an_error_in_words():
    with pytest.raises(PlanError, match="prunable"):
        units_ratio_for_parameters({}, {}, 10_000, 0.2)


def test_rounds_by_hand():
    assert [width_after_round(1536, 1152, 3, index, 8) for index in range(3)] == [1408, 1280, 1152]
    assert [width_after_round(100, 40, 4, index, 8) for index in range(4)] == [88, 72, 56, 40]
    assert width_after_round(100, 40, 1, 0, 8) == 40


@given(
    dense=st.integers(1, 20_000),
    share=st.floats(0, 1),
    rounds=st.integers(1, 64),
    multiple=st.sampled_from([1, 2, 8, 16, 64]),
)
@settings(deadline=None, max_examples=300)
def test_rounds_never_grow_and_end_at_the_target(dense, share, rounds, multiple):
    final = max(int(dense * share) // multiple * multiple, min(multiple, dense))
    widths = [width_after_round(dense, final, rounds, index, multiple) for index in range(rounds)]
    assert widths[-1] == final
    for before, after in zip([dense, *widths], widths, strict=False):
        assert final <= after <= before
    for index, width in enumerate(widths[:-1]):
        assert width % multiple == 0 or width in (final, dense)
        exact = dense - Fraction((dense - final) * (index + 1), rounds)
        assert width >= min(exact, dense)
        assert width < exact + multiple
