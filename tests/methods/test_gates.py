"""Eigenvalues and receding importances, worked by hand; what both promise the stage that learns."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cria_dist.methods import Eigenvalue, Receding, SiteStatistics

METHODS = [
    Eigenvalue(),
    Eigenvalue(variant="all", l2=0.1),
    Receding(),
    Receding(opening=0.9, shift=3.0),
    Receding(scaling="batch_norm"),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def scores(method, learned_N) -> list[float]:
    return method.score(SiteStatistics(width=len(learned_N), gate_N=np.array(learned_N))).keep_N.tolist()


def test_eigenvalue_worked_by_hand():
    """Three neurons; the second was turned round, the third nearly switched off."""
    method = Eigenvalue(l1=0.1, l2=0.01)
    learned_N = np.array([1.5, -2.0, 0.25])
    assert scores(method, learned_N) == [1.5, 2.0, 0.25]
    assert method.gate(learned_N).tolist() == [1.5, -2.0, 0.25]
    assert float(method.penalty(learned_N)) == pytest.approx(0.1 * 3.75 + 0.01 * 6.3125)


def test_receding_worked_by_hand():
    """Gates of 1/2, 3/4 and 1/4; 1 / opening lies in the output map, so the factors are 2/3, 1 and 1/3."""
    method = Receding(opening=0.75, strength=0.01)
    learned_N = np.log([1.0, 3.0, 1 / 3])
    assert scores(method, learned_N) == pytest.approx([0.5, 0.75, 0.25])
    assert method.gate(learned_N).tolist() == pytest.approx([2 / 3, 1, 1 / 3])
    assert float(method.penalty(learned_N)) == pytest.approx(0.0240891, abs=1e-7)
    assert Receding(strength=0.01, shift=1.0).penalty(learned_N - 1.0) == pytest.approx(0.0240891, abs=1e-7)


def test_receding_in_place_of_batch_norm_worked_by_hand():
    """Scales of 0.8, 0.4 and 0, the largest one starts at 1/2: gates of 1/2, 1/4 and none, all times 1.6."""
    method = Receding(scaling="batch_norm")
    start_N = method.starts(np.array([0.8, 0.4, 0.0]) / 0.8)
    assert start_N[:2].tolist() == pytest.approx([0.0, np.log(1 / 3)])
    assert scores(method, start_N) == pytest.approx([0.5, 0.25, 5e-13])
    assert method.scales_norms
    assert not Receding().scales_norms
    assert Receding().starts(np.ones(2)).tolist() == [0.0, 0.0]


def test_a_setting_that_is_not_made_leaves_no_trace():
    """Digests of runs are made of what a method dumps."""
    assert "scaling" not in Receding().model_dump(mode="json")
    assert Receding(scaling="batch_norm").model_dump()["scaling"] == "batch_norm"
    assert Receding(scaling="batch_norm", variant="all").title == "receding (batch_norm, all)"


@every_method
def test_the_start_is_the_trained_network(method):
    start_N = torch.full((4,), method.start, dtype=torch.float64)
    assert method.gate(start_N).tolist() == pytest.approx([1.0] * 4, rel=1e-15)
    assert len(set(scores(method, start_N.numpy()))) == 1, "before training no neuron matters more than another"


@every_method
def test_a_larger_gate_is_a_higher_score(method):
    learned_N = np.linspace(0.01, 9.0, 50)
    assert (np.diff(scores(method, learned_N)) > 0).all()
    assert (np.diff(method.gate(learned_N)) > 0).all()


def test_receding_tells_open_gates_apart():
    """In float32 both would be 1."""
    lower, higher = scores(Receding(), [30.0, 31.0])
    assert lower < higher < 1


@every_method
def test_the_facts_are_about_the_gates(method, make_statistics):
    verdict = method.score(make_statistics())
    assert verdict.facts == {"median_gate": np.median(verdict.keep_N), "least_gate": verdict.keep_N.min()}


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        (Eigenvalue, {"l1": -1e-3}),
        (Eigenvalue, {"steps": 0}),
        (Eigenvalue, {"variant": "eigenvalues"}),
        (Receding, {"opening": 1.0}),
        (Receding, {"strength": float("inf")}),
        (Receding, {"learning_rate": 0.0}),
    ],
)
def test_knobs_have_bounds(method, knobs):
    with pytest.raises(ValidationError):
        method(**knobs)


@every_method
def test_gates_of_all_layers_are_compared_as_they_are(method):
    """The papers' one threshold over all gates."""
    assert method.comparable
