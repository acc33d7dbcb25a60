"""The ridge goes by the typical signal, however large a single one is."""

import numpy as np
import pytest

from cria_dist.maths.elimination import eliminate
from cria_dist.maths.repair import least_squares
from cria_dist.maths.ridge import added_ridge
from cria_dist.records import Moments


@pytest.mark.parametrize(
    ("diagonal", "ridge", "expected"),
    [
        pytest.param([1.0, 2.0, 3.0, 6.0], 1e-3, 3e-3, id="the mean"),
        pytest.param([0.0, 1.0, 2.0, 3.0, 4e9], 1e-3, 2.5, id="dead signals are not typical"),
        pytest.param([1.0, 2.0, 3.0, 6.0], 10.0, 25.0, id="a large one is meant"),
        pytest.param([0.0, 0.0], 1e-3, 1.0, id="nothing there"),
    ],
)
def test_the_ridge(diagonal: list[float], ridge: float, expected: float) -> None:
    gram_NN = np.diag(diagonal)
    assert added_ridge(gram_NN, float(np.mean(diagonal)), ridge) == pytest.approx(expected)


def test_a_massive_signal_leaves_the_repair_of_the_others_its_worth() -> None:
    """Signals of rank 4 among 24: most can go at little cost, whatever one of them is on a single token."""
    draw = np.random.default_rng(0)
    signals_TN = draw.normal(size=(400, 4)) @ draw.normal(size=(4, 24))
    weight_DN = draw.normal(size=(8, 24))
    seen_TN = signals_TN.copy()
    seen_TN[0, 3] += 1e6
    moments = Moments(len(seen_TN), seen_TN.sum(axis=0), seen_TN.T @ seen_TN)
    kept_S = np.sort(eliminate(moments.gram_NN, weight_DN, 1e-3).order_N[10:])
    dense_TD = signals_TN @ weight_DN.T
    repaired_DS = least_squares(weight_DN, moments, kept_S, 1e-3)
    errors = [
        float(np.linalg.norm(signals_TN[:, kept_S] @ one_DS.T - dense_TD) / np.linalg.norm(dense_TD))
        for one_DS in (weight_DN[:, kept_S], repaired_DS)
    ]
    assert errors[1] < 0.5 * errors[0], "by the mean alone, the ridge would leave the weights as they are"
