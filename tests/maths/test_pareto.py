"""The Pareto front against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cria_dist.maths.pareto import front


def test_a_staircase_by_hand() -> None:
    points_PD = np.array([[1.0, 9.0], [2.0, 5.0], [2.0, 6.0], [4.0, 5.0], [5.0, 1.0], [5.0, 1.0]])
    assert front(points_PD).tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_on_it_and_beats_nobody(bad: float) -> None:
    points_PD = np.array([[1.0, bad], [2.0, 3.0], [-np.inf, 1.0]])
    assert front(points_PD).tolist() == [False, True, False]


def test_no_points() -> None:
    assert front(np.zeros((0, 2))).tolist() == []


@given(arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 4)))
def test_a_point_is_on_it_exactly_when_no_other_beats_it(points_PD: np.ndarray) -> None:
    rows = [tuple(row) for row in points_PD.tolist()]

    def beats(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    assert front(points_PD.astype(float)).tolist() == [not any(beats(one, row) for one in rows) for row in rows]
