"""What a budget is a share of, what may become of every site, and what is refused before anything runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, PlanError
from cria_dist.maths.allocation_rooms import Room
from cria_dist.models import checkpoint
from cria_dist.models.attention import LAYER_KV_HEADS
from cria_dist.models.family import family_of
from cria_dist.models.macs import macs_of_layers, macs_per_position
from cria_dist.records import Site
from cria_dist.stages.budget import Budget, budget_of, held_out, rooms_of
from cria_dist.stages.prepare import prepare

RunConfigMaker = Callable[..., RunConfig]


def macs_of_linear_maps(model: torch.nn.Module, length: int) -> int:
    """Counted while the model runs one sequence, without attention's own products."""
    counted: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, args, _: counted.append(args[0].numel() // args[0].shape[-1] * module.weight.numel())
            )
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, length, dtype=torch.int64))
    return sum(counted)


def test_macs_are_those_of_a_forward_pass(pico: Path) -> None:
    config = checkpoint.read_config(pico)
    model = checkpoint.load_model(pico, checkpoint.Numerics())
    attention = 2 * 2 * 16 * 4 * 8  # two products per layer, with 16 positions, in 4 heads of 8
    found = macs_per_position(config, family_of(config), 16)
    assert 16 * found == macs_of_linear_maps(model, 16) + 16 * attention


def test_macs_of_attention_are_of_the_heads_that_are_left(make_model: Callable[..., Path], tmp_path: Path) -> None:
    config = checkpoint.read_config(make_model(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4))
    fewer, family = {**config, LAYER_KV_HEADS: [4, 1]}, family_of(config)
    gone = 3 * family.unit_macs(Site(0, "attention"), config, 64)
    assert macs_per_position(config, family, 64) - macs_per_position(fewer, family, 64) == gone
    dense, left = (macs_of_layers(one, family, 64) for one in (config, fewer))
    assert left == [dense[0], dense[1] - gone]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_macs_of_experts_are_of_those_a_token_goes_through(
    model_type: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a router's map and two experts, as against a plain MLP in one layer of Qwen3."""
    own = {"qwen3_moe": {"moe_intermediate_size": 24, "mlp_only_layers": [1]}}.get(model_type, {})
    model = make_model(tmp_path / "model", model_type, num_experts=5, num_experts_per_tok=2, **own)
    config = checkpoint.read_config(model)
    width, experts = (48, (2, 2)) if model_type == "mixtral" else (24, (2, 0))
    attention = 3 * 32 * 32 + 2 * 16 * 4 * 8
    layers = [attention + (5 * 32 + 2 * 3 * 32 * width if used else 3 * 32 * 48) for used in experts]
    assert macs_of_layers(config, family_of(config), 16) == layers
    assert macs_per_position(config, family_of(config), 16) == sum(layers) + 300 * 32


def test_a_unit_takes_its_macs_along(make_model: Callable[..., Path], tmp_path: Path) -> None:
    wide, narrow = (make_model(tmp_path / str(n), intermediate_size=n, mlp_bias=True) for n in (48, 47))
    found = [
        macs_per_position(checkpoint.read_config(path), family_of(checkpoint.read_config(path)), 16)
        for path in (wide, narrow)
    ]
    config = checkpoint.read_config(wide)
    assert found[0] - found[1] == 2 * family_of(config).unit_macs(Site(0), config, 64) == 2 * 3 * 32
    assert family_of(config).unit_cost(Site(0), config) == 3 * 32 + 2, "its biases are parameters, but multiply nothing"


@pytest.mark.parametrize(("measure", "unit_cost"), [("units", 1), ("parameters", 96), ("macs", 96)])
def test_an_even_budget_in_any_measure(
    measure: str, unit_cost: int, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    """At least the share asked for, and less than one multiple per layer more."""
    job = prepare(run_config(tmp_path, prune={"ratio": 0.1, "budget": measure, "multiple": 4}))
    budget = budget_of(job.config, job.family, job.model_config, job.dense_parameters)
    assert set(budget.unit_cost.values()) == {unit_cost}
    removed = sum(48 - width for width in job.final_widths.values()) * unit_cost
    assert 0.1 * budget.total <= removed < 0.1 * budget.total + 4 * 2 * unit_cost


def test_every_round_takes_the_same_part(run_config: RunConfigMaker, tmp_path: Path) -> None:
    prune = run_config(tmp_path, prune={"ratio": 0.3, "rounds": 3}).prune
    left = [
        Budget({Site(0): 5, Site(1): 5}, 1000).left({Site(0): 100, Site(1): 60}, prune, index) for index in range(3)
    ]
    assert left == pytest.approx([700, 600, 500])


def test_rooms(run_config: RunConfigMaker, tmp_path: Path) -> None:
    """Floors are shares of the dense widths, also when a round before took units."""
    changes = {"allocation": "global", "floor": 0.3, "multiple": 8, "protect": [0, -1]}
    prune = run_config(tmp_path, prune=changes).prune
    dense = {Site(layer): 100 for layer in range(4)}
    present = {site.key: 100 - 10 * site.layer for site in dense}
    assert rooms_of(prune, Budget(dict.fromkeys(dense, 7), 0), dense, present) == {
        "layer-000.mlp": Room(100, 100, 8, 7),
        "layer-001.mlp": Room(90, 32, 8, 7),
        "layer-002.mlp": Room(80, 32, 8, 7),
        "layer-003.mlp": Room(70, 70, 8, 7),
    }


@pytest.mark.parametrize(
    ("sequences", "shard", "seen", "first"),
    [(12, 4, 2, 8), (48, 0, 5, 40), (40, 10, 3, 30), (33, 4, 7, 28), (16, 1, 12, 12)],
)
def test_the_last_shards_are_held_out(
    sequences: int, shard: int, seen: int, first: int, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    changes = {"data": {"calibration_sequences": sequences}, "record": {"shard_sequences": shard}}
    assert held_out(run_config(tmp_path, **changes)) == (seen, range(first, sequences))


SPREAD: dict[str, Any] = {"allocation": "global", "multiple": 4}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"prune": {**SPREAD, "ratio": 0.8}},
            PlanError,
            r"ratio=0\.8 cannot be reached: .* 0\.750 go; lower",
        ),
        ({"prune": {**SPREAD, "ratio": 0.5, "protect": [0]}}, PlanError, r"0\.375 go; .* or protect fewer layers"),
        ({"prune": {**SPREAD, "protect": [0, 1]}}, ConfigError, r"protect=\[0, 1\].* leave nothing to prune"),
        ({"prune": {**SPREAD, "floor": 0.99}}, ConfigError, r"floor=0\.99 .*leave nothing to prune"),
        (
            {"prune": {**SPREAD, "protect": [2]}},
            ConfigError,
            r"layer 2, but .* layers 0 to 1 \(-1 is the last",
        ),
        ({"prune": {**SPREAD, "protect": [-3]}}, ConfigError, r"names layer -3"),
        (
            {"prune": SPREAD, "record": {"shard_sequences": 12}},
            ConfigError,
            r"one shard; lower .*shard_sequences=12",
        ),
        ({"prune": {**SPREAD, "budget": "parameters", "ratio": 0.6}}, PlanError, r"ratio=0\.6 cannot be reached"),
    ],
)
def test_what_cannot_be_spread_is_refused_in_one_line(
    changes: dict[str, Any], error: type[Exception], message: str, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        prepare(run_config(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_images_are_refused(run_config: RunConfigMaker, pico_vit: Path, tmp_path: Path) -> None:
    calibration = {"source": str(tmp_path), "format": "images", "field": "image"}
    config = run_config(
        tmp_path, model={"path": str(pico_vit)}, data={"calibration": calibration}, prune={"allocation": "sensitivity"}
    )
    with pytest.raises(ConfigError, match=r"'vit' takes images; use prune\.allocation=uniform"):
        prepare(config, "apply")


def test_layers_are_refused(run_config: RunConfigMaker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"units of another kind; use prune\.allocation=uniform"):
        prepare(run_config(tmp_path, method={"name": "block_influence"}, prune=SPREAD), "apply")


@pytest.mark.parametrize(("floor", "ratio"), [(0.9, 0.4), (0.25, 0.8)])
def test_floors_do_not_keep_layers_that_may_go(
    floor: float, ratio: float, make_model: Callable[..., Path], run_config: RunConfigMaker, tmp_path: Path
) -> None:
    """Of eight layers all but one may go, whatever has to stay inside those that do not."""
    model = make_model(tmp_path / "model", num_hidden_layers=8)
    whole = {"units": ["mlp", "layer"], "allocation": "sensitivity", "budget": "parameters", "floor": floor}
    settings = {"model": {"path": str(model)}, "method": {"name": "magnitude"}}
    prepare(run_config(tmp_path, **settings, prune={**whole, "ratio": ratio}))
    with pytest.raises(PlanError, match=r"ratio=0\.95 cannot be reached"):
        prepare(run_config(tmp_path, **settings, prune={**whole, "ratio": 0.95}))
