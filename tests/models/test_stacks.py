"""Which rows of a tensor are a unit's, by hand: two units in tensors of several maps."""

import pytest
import torch

from cria_dist.models.stacks import ONE_MAP, Stack
from cria_dist.models.surgery import Selection
from cria_dist.stages.gradients import unit_salience

ROWS = {
    "one map": (ONE_MAP, [[0, 1, 2]], [[3, 4, 5]]),
    "gate and up": (Stack((1, 1)), [[0, 1], [4, 5]], [[2, 3], [6, 7]]),
    "two queries to a key and a value": (Stack((2, 1, 1)), [[0, 1], [4], [6]], [[2, 3], [5], [7]]),
    "head by head": (Stack((1, 1, 1), by_unit=True), [[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]),
}
"""Rows of the first and of the second unit in every map."""


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest) -> tuple[Stack, list[list[int]], list[list[int]]]:
    return ROWS[request.param]


def flat(*units: list[list[int]]) -> list[int]:
    return [row for rows in units for one in rows for row in one]


@pytest.mark.parametrize("dim", [0, 1])
def test_maps_come_out_one_by_one(case: tuple[Stack, list[list[int]], list[list[int]]], dim: int) -> None:
    stack, first, second = case
    numbers = torch.arange(len(flat(first, second)))
    tensor = numbers[:, None] if dim == 0 else numbers[None]
    found = [one.flatten().tolist() for one in stack.split(tensor, 2, dim)]
    assert found == [mine + yours for mine, yours in zip(first, second, strict=True)]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_unit_leaves_with_all_its_rows(case: tuple[Stack, list[list[int]], list[list[int]]], dim: int) -> None:
    stack, *rows = case
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(len(flat(*rows)), 3, generator=generator)
    for unit, own in enumerate(rows):
        kept = Selection(torch.tensor([unit]), 2, stack).of(tensor if dim == 0 else tensor.T, dim)
        assert torch.equal(kept if dim == 0 else kept.T, tensor[sorted(flat(own))])
    whole = Selection(torch.tensor([0, 1]), 2, stack).of(tensor, 0)
    assert torch.equal(whole, tensor)


def test_sums_are_over_the_same_rows(case: tuple[Stack, list[list[int]], list[list[int]]]) -> None:
    stack, *rows = case
    values = torch.rand(len(flat(*rows)), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = [float(values[flat(own)].sum()) for own in rows]
    assert stack.sums(values, 2).tolist() == pytest.approx(expected)
    weight = torch.nn.Parameter(values[:, None])
    weight.grad = torch.ones_like(weight)
    assert unit_salience(weight, 0, 2, stack).tolist() == pytest.approx(expected)
