"""Gates and penalties: worked by hand, against numeric derivatives, through any array library, far out."""

import array_api_strict as strict
import numpy as np
import pytest
import torch

from cria_dist.maths.gates import elastic_penalty, log_sigmoid, receding_penalty, sigmoid

PENALTIES = {
    "receding": lambda w: receding_penalty(w, 0.0),
    "receding, shifted": lambda w: receding_penalty(w, 3.0),
    "elastic": lambda w: elastic_penalty(w, 0.3, 0.7),
}
POINTS = np.array([-9.0, -4.2, -1.2, -0.1, 0.4, 2.5, 8.0])


def slopes(penalty, learned_N: np.ndarray) -> np.ndarray:
    """Central differences."""
    step = 1e-5 * np.eye(len(learned_N))
    return np.array([float(penalty(learned_N + one) - penalty(learned_N - one)) / 2e-5 for one in step])


def test_worked_by_hand():
    w_N = np.log([1.0, 3.0, 1 / 3])  # sigmoid(ln 3) = 3 / 4
    np.testing.assert_allclose(sigmoid(w_N), [0.5, 0.75, 0.25], rtol=1e-15)
    np.testing.assert_allclose(log_sigmoid(w_N), np.log([0.5, 0.75, 0.25]), rtol=1e-15)
    # 1/2 (1 + ln 2) + 3/4 (1 - ln 3/4) + 1/4 (1 + ln 4) = 0.84657 + 0.96576 + 0.59657
    assert float(receding_penalty(w_N, 0.0)) == pytest.approx(2.40891, abs=1e-5)
    assert float(receding_penalty(w_N - 3.0, 3.0)) == pytest.approx(2.40891, abs=1e-5)
    assert float(elastic_penalty(np.array([-2.0, 0.5]), 10.0, 1.0)) == 25.0 + 4.25


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_gradients_are_the_numeric_derivative(penalty):
    learned_N = torch.tensor(POINTS, requires_grad=True)
    penalty(learned_N).backward()
    np.testing.assert_allclose(learned_N.grad.numpy(), slopes(penalty, POINTS), rtol=1e-6, atol=1e-9)


def test_the_push_is_strongest_at_a_gate_of_a_quarter_and_fades():
    w_N = np.linspace(-8, 8, 3201)
    learned_N = torch.tensor(w_N, requires_grad=True)
    receding_penalty(learned_N, 0.0).backward()
    slope_N, gate_N = learned_N.grad.numpy(), sigmoid(w_N)
    np.testing.assert_allclose(slope_N, -np.log(gate_N) * gate_N * (1 - gate_N), rtol=1e-9)
    assert gate_N[slope_N.argmax()] == pytest.approx(0.236, abs=1e-3)
    assert slope_N.max() == pytest.approx(0.260, abs=1e-3)
    assert max(slope_N[0], slope_N[-1]) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_nothing_is_infinite(dtype):
    learned_N = torch.tensor([-1e4, -200.0, 200.0, 1e4], dtype=dtype, requires_grad=True)
    total = receding_penalty(learned_N, 3.0) + sigmoid(learned_N).sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(4.0, abs=1e-6)
    assert torch.isfinite(learned_N.grad).all()
    assert learned_N.grad.abs().max() < 1e-6


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_penalties_need_the_array_api_alone(penalty):
    found = penalty(strict.asarray(POINTS))
    assert type(found).__module__.startswith("array_api_strict")
    assert float(found) == pytest.approx(float(penalty(POINTS)), rel=1e-12)
    assert float(penalty(torch.tensor(POINTS))) == pytest.approx(float(penalty(POINTS)), rel=1e-12)
