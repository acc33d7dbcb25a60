"""One candidate per site: exact equals brute force, greedy stays within its bound, budgets are kept and used up."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cria_dist.errors import PlanError
from cria_dist.maths import knapsack
from cria_dist.maths.knapsack import Menu, choose, choose_exact, choose_greedily


def menu(entries: list[tuple[int, int]]) -> Menu:
    """Of (cost, loss) pairs; costs must be distinct."""
    ordered = np.array(sorted(entries), dtype=np.float64)
    return Menu(ordered[:, 0], ordered[:, 1])


entries = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=5, unique_by=lambda e: e[0])
menus_of_any_shape = st.lists(entries.map(menu), min_size=1, max_size=4)


def falling(entries: list[tuple[int, int]]) -> Menu:
    """Losses that never rise with the cost, as measured curves are made to be."""
    one = menu(entries)
    return Menu(one.costs_C, np.maximum.accumulate(one.losses_C[::-1])[::-1])


falling_menus = st.lists(entries.map(falling), min_size=1, max_size=4)


def cost(menus: list[Menu], chosen: list[int]) -> float:
    return sum(float(one.costs_C[index]) for one, index in zip(menus, chosen, strict=True))


def loss(menus: list[Menu], chosen: list[int]) -> float:
    return sum(float(one.losses_C[index]) for one, index in zip(menus, chosen, strict=True))


def brute_force(menus: list[Menu], budget: float) -> float:
    choices = itertools.product(*(range(one.costs_C.size) for one in menus))
    return min(loss(menus, list(chosen)) for chosen in choices if cost(menus, list(chosen)) <= budget)


def cheapest(menus: list[Menu]) -> float:
    return sum(float(one.costs_C[0]) for one in menus)


@given(menus=menus_of_any_shape, extra=st.integers(0, 120))
@settings(deadline=None, max_examples=120)
def test_exact_is_brute_force(menus: list[Menu], extra: int) -> None:
    budget = cheapest(menus) + extra
    chosen = choose_exact(menus, budget)
    assert cost(menus, chosen) <= budget
    assert loss(menus, chosen) == brute_force(menus, budget)


@given(menus=menus_of_any_shape, extra=st.integers(0, 120))
@settings(deadline=None, max_examples=200)
def test_greedy_loses_at_most_one_step_of_a_hull(menus: list[Menu], extra: int) -> None:
    budget = cheapest(menus) + extra
    chosen = choose_greedily(menus, budget)
    assert cost(menus, chosen) <= budget
    one_step = max(float(one.losses_C.max() - one.losses_C.min()) for one in menus)
    assert brute_force(menus, budget) <= loss(menus, chosen) <= brute_force(menus, budget) + one_step


@given(menus=menus_of_any_shape, extra=st.integers(0, 120), less=st.integers(0, 60))
@settings(deadline=None, max_examples=150)
def test_a_smaller_budget_never_gives_a_site_more(menus: list[Menu], extra: int, less: int) -> None:
    budget = cheapest(menus) + extra
    assume(budget - less >= cheapest(menus))
    wide, narrow = choose_greedily(menus, budget), choose_greedily(menus, budget - less)
    assert all(low <= high for low, high in zip(narrow, wide, strict=True))


@given(menus=falling_menus, extra=st.integers(0, 120), exact=st.booleans())
@settings(deadline=None, max_examples=150)
def test_nothing_that_fits_is_left_unused(menus: list[Menu], extra: int, exact: bool) -> None:
    budget = cheapest(menus) + extra
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "EXACT_LIMIT", 10_000 if exact else 0)
        chosen = choose(menus, budget)
    left = budget - cost(menus, chosen)
    assert left >= 0
    for one, index in zip(menus, chosen, strict=True):
        assert index == one.costs_C.size - 1 or one.costs_C[index + 1] - one.costs_C[index] > left
    if exact:
        assert loss(menus, chosen) == brute_force(menus, budget)


def test_parameters_of_a_large_model_are_kept_to_the_last() -> None:
    """Costs of 10**8 against a solver whose tolerance is absolute."""
    unit = 3 * 4096
    menus = [Menu(unit * np.arange(1.0, 12.0), np.arange(11.0, 0.0, -1.0)) for _ in range(4)]
    chosen = choose_exact(menus, unit * 20 - 1)
    assert cost(menus, chosen) == unit * 19
    assert cost(menus, choose_exact(menus, unit * 20)) == unit * 20


def test_by_hand() -> None:
    """The steep site keeps its units; greedy steps over the hull and may not take what lies above it."""
    steep, flat = menu([(1, 10), (2, 4), (3, 0)]), menu([(1, 3), (2, 2), (3, 0)])
    assert choose_exact([steep, flat], 4) == [2, 0]
    assert choose_greedily([steep, flat], 4) == [2, 0]
    assert choose_greedily([steep, flat], 5) == [2, 0]
    assert choose([steep, flat], 5) == [2, 1]


def test_what_cannot_be_kept_names_the_remedy() -> None:
    one = menu([(5, 1), (9, 0)])
    for choice in (choose_exact, choose_greedily, choose):
        with pytest.raises(PlanError, match=r"leaves 9, .* must stay costs 10; lower prune\.ratio or prune\.floor"):
            choice([one, one], 9)


def alike_menus(sites: int) -> list[Menu]:
    """Neurons and groups of layers whose losses differ by up to 3 %, in the costs of a real model."""
    rng = np.random.default_rng(0)
    neurons, groups = np.arange(384.0, 1537, 8), np.arange(1.0, 4)
    measured = np.append(np.cumsum(rng.exponential(size=6))[::-1], 0.0)
    bent = np.interp(neurons, np.linspace(384, 1536, 7), measured)
    steep = np.append(2 * np.cumsum(rng.exponential(size=2))[::-1], 0.0)
    menus = [Menu(1728 * neurons, bent * rng.uniform(1, 1.03)) for _ in range(sites)]
    return menus + [Menu(294912 * groups, steep * rng.uniform(1, 1.03)) for _ in range(sites)]


def test_sites_that_are_nearly_alike_are_not_searched_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of a few nodes is taken, the same again and no worse than the greedy choice."""
    searched: list[int] = []
    real = knapsack.milp

    def counted(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        searched.append(result.mip_node_count)
        return result

    monkeypatch.setattr(knapsack, "milp", counted)
    monkeypatch.setattr(knapsack, "NODES", 10, raising=False)
    menus = alike_menus(12)
    budget = 0.5 * sum(float(one.costs_C[-1]) for one in menus)
    chosen = choose(menus, budget)
    assert searched == [10]
    assert cost(menus, chosen) <= budget
    assert loss(menus, chosen) <= loss(menus, choose_greedily(menus, budget))
    assert choose(menus, budget) == chosen


def test_a_search_that_finds_nothing_leaves_the_greedy_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "NODES", 0, raising=False)
    menus = alike_menus(2)
    budget = 0.5 * sum(float(one.costs_C[-1]) for one in menus)
    assert choose_exact(menus, budget) == choose_greedily(menus, budget)
