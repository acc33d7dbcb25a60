from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from cria_dist import files
from cria_dist.maths.allocation_rooms import SLOPE, Room
from cria_dist.models import checkpoint
from cria_dist.pipeline.latency import budget_of_times
from cria_dist.records import Site
from cria_dist.stages.layer_times import LAYERS, LayerTimer, LayerTimes, TimingTask, layer_times

WIDTHS = {"attention": (1, 2), "mlp": (8, 24, 48)}


@pytest.fixture(scope="module")
def task(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> TimingTask:
    folder = tmp_path_factory.mktemp("times")
    model = make_model(folder / "model", num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2)
    config = checkpoint.read_config(model)
    return TimingTask(config, WIDTHS, "prefill", 16, checkpoint.Numerics(), 1, folder / "times.json")


def by_shape(model: PreTrainedModel) -> float:
    """A clock that knows what is in a model: 5 outside the layers, 40 in a head, and what :func:`layer_of` says."""
    head = 40 if model.base_model is not model else 0
    return 5 + head + sum(layer_of(one, model.config.head_dim) for one in model.base_model.layers)


def layer_of(layer: Any, head_dim: int) -> float:
    """In a layer 1 + 3 per group + 0.25 per neuron."""
    return 1 + 3 * layer.self_attn.k_proj.out_features / head_dim + 0.25 * layer.mlp.up_proj.out_features


def test_what_layers_and_their_units_take_is_found(task: TimingTask) -> None:
    seen: list[int] = []

    def measure(whole: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
        seen.append(len(other.base_model.layers))
        return by_shape(whole), by_shape(other)

    times = layer_times(task, measure)
    layer = 1 + 3 * 2 + 0.25 * 48
    assert seen == [1, 1, *[LAYERS] * 3]
    assert times.layer_ms == pytest.approx(layer)
    assert times.model_ms == pytest.approx(5 + 40 + 9 * layer)
    assert dict(times.parts["mlp"]) == pytest.approx({8: 0, 24: 4, 48: 10})
    assert dict(times.parts["attention"]) == pytest.approx({1: 0, 2: 3})


def test_a_narrower_part_that_seems_slower_is_noise(task: TimingTask) -> None:
    jumps = {8: 0.0, 24: 2.0, 48: 0.0}

    def measure(whole: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
        width = other.base_model.layers[0].mlp.up_proj.out_features
        return 10.0, 10.0 + jumps[width]

    rows = layer_times(task, measure).parts["mlp"]
    assert [time for _, time in rows] == sorted(time for _, time in rows)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_clock_measures_real_models_and_keeps_the_result(task: TimingTask, phase: str, tmp_path: Path) -> None:
    timer = LayerTimer(TimingTask(task.config, WIDTHS, phase, 16, task.numerics, 1, tmp_path / "times.json"))
    times = timer("layers")
    assert times.model_ms > 0
    record = files.read_json(tmp_path / "times.json")
    assert record["model_ms"] == times.model_ms
    assert [[width, time] for width, time in times.parts["mlp"]] == record["parts"]["mlp"]


def test_the_budget_in_milliseconds_adds_up_to_the_layers() -> None:
    times = LayerTimes(100.0, 20.0, {"attention": ((1, 0.0), (2, 3.0)), "mlp": ((8, 0.0), (48, 12.0))})
    sites = {Site(0, "attention"): 2, Site(0, "mlp"): 48, Site(0, "block"): 1}
    budget = budget_of_times(times, sites, {})
    assert budget.total == 100
    assert sum(budget.unit_cost[site] * width for site, width in sites.items()) == pytest.approx(20)
    assert budget.measured == {Site(0, "attention"): ((1, 0.0), (2, 3.0)), Site(0, "mlp"): ((8, 0.0), (48, 12.0))}


def test_narrower_layers_take_what_was_measured_at_their_width() -> None:
    """The second layer has half of the neurons, and one group of two, which the run leaves alone."""
    times = LayerTimes(100.0, 20.0, {"attention": ((1, 0.0), (2, 3.0)), "mlp": ((8, 0.0), (24, 10.0), (48, 12.0))})
    sites = {Site(0, "mlp"): 48, Site(0, "block"): 1, Site(1, "mlp"): 24, Site(1, "block"): 1}
    budget = budget_of_times(times, sites, {Site(1, "attention"): 1})
    taken = {site: budget.unit_cost[site] * width for site, width in sites.items()}
    expected = {Site(0, "mlp"): 12, Site(0, "block"): 8, Site(1, "mlp"): 10, Site(1, "block"): 5}
    assert taken == pytest.approx(expected, rel=2 * SLOPE)
    assert budget.total == pytest.approx(100 - 2 - 3, rel=2 * SLOPE)


def test_a_layer_where_times_are_flat_costs_little_but_something() -> None:
    """Or the least step between two costs would be none, which choices are scaled by."""
    times = LayerTimes(100.0, 20.0, {"mlp": ((8, 0.0), (24, 0.0), (48, 12.0))})
    sites = {Site(0, "mlp"): 48, Site(1, "mlp"): 24}
    budget = budget_of_times(times, sites, {})
    narrow = Room(24, 8, 8, budget.unit_cost[Site(1)], budget.measured[Site(1)])
    costs = [narrow.cost(width) for width in (8, 16, 24)]
    assert min(np.diff(costs)) > 0
    assert costs[-1] == pytest.approx(24 * budget.unit_cost[Site(1)])
    assert costs[-1] < SLOPE * 12
