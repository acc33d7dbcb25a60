"""From scores to a plan in the numbering of the dense model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist.models import checkpoint, surgery
from cria_dist.models.family import family_of
from cria_dist.records import PruningPlan, Scores, Site
from cria_dist.stages.decide import Accounts, compose, local_indices, make_plan, select

KEY = "layer-000.mlp"


def scores(keep: list[float], edges: list[tuple[int, int]] | None = None) -> Scores:
    edges_E2 = None if edges is None else np.array(edges, dtype=np.int32).reshape(-1, 2)
    return Scores(Site(0), np.array(keep), np.ones(len(keep), np.int64), edges_E2)


def plan(kept: dict[str, tuple[int, ...]], widths: dict[str, int]) -> PruningPlan:
    return make_plan(kept, widths, Accounts(100_000, dict.fromkeys(widths, 10)), "m", "d")


def test_the_lowest_go() -> None:
    assert select(scores([0.5, 0.1, 0.9, 0.2, 0.7]), 3) == (0, 2, 4)
    assert select(scores([0.5, 0.1, 0.9, 0.2, 0.7]), 5) == (0, 1, 2, 3, 4)
    assert select(scores([0.5, 0.1, 0.9, 0.2, 0.7]), 1) == (2,)


def test_the_dead_go_first_and_ties_by_index() -> None:
    assert select(scores([1.0, -np.inf, 1.0, 0.5]), 3) == (0, 2, 3)
    assert select(scores([1.0, 1.0, 1.0, 1.0]), 2) == (2, 3)


def test_the_guard_spares_a_neighbour() -> None:
    keep = [0.1, 0.11, 0.5, 0.9]
    assert select(scores(keep), 2) == (2, 3)
    assert select(scores(keep, [(0, 1)]), 2) == (1, 3)
    assert select(scores(keep, []), 2) == (2, 3)


def test_rounds_compose_to_the_dense_numbering() -> None:
    """Cutting an array of dense indices round by round gives the kept indices of the plan."""
    rng = np.random.default_rng(0)
    widths = {KEY: 50, "layer-001.mlp": 40}
    held = {key: np.arange(width) for key, width in widths.items()}
    previous: PruningPlan | None = None
    for share in (0.9, 0.7, 0.5):
        survivors = {
            key: tuple(np.sort(rng.choice(len(held[key]), int(width * share), replace=False)).tolist())
            for key, width in widths.items()
        }
        held = {key: held[key][list(survivors[key])] for key in widths}
        now = plan(compose(survivors, previous), widths)
        assert {key: tuple(units.tolist()) for key, units in held.items()} == now.kept
        assert local_indices(now, previous) == survivors
        if previous is not None:
            assert all(set(now.kept[key]) < set(previous.kept[key]) for key in widths)
        previous = now


def test_plans_are_plain_and_survive_json() -> None:
    one = plan({KEY: (1, 3, 4)}, {KEY: 5})
    assert PruningPlan.from_json(one.to_json()) == one
    assert one.to_json() == plan({KEY: (1, 3, 4)}, {KEY: 5}).to_json()
    assert "np." not in one.to_json()
    assert one.parameters == (100_000, 99_980)
    assert one.ratio == 20 / 100_000


def test_select_gives_plain_integers() -> None:
    assert {type(index) for index in select(scores([0.3, 0.1, 0.2]), 2)} == {int}


FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", "mlp_bias": True, "tie_word_embeddings": False},
    {"model_type": "mistral", "tie_word_embeddings": False},
    {"model_type": "qwen2"},
    {"model_type": "qwen3"},
]


@pytest.mark.parametrize("kept", [16, 40])
@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: "-".join(map(str, model.values())))
def test_the_ratio_is_that_of_the_written_checkpoint(
    model: dict[str, Any], kept: int, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_model(tmp_path / "dense", **model)
    config = checkpoint.read_config(dense)
    family = family_of(config)
    widths = {site.key: width for site, width in family.widths(config).items()}
    indices = {key: tuple(range(kept)) for key in widths}
    parameters = checkpoint.count_parameters(config)
    unit_cost = dict.fromkeys(widths, family.unit_cost(Site(0), config))
    made = make_plan(indices, widths, Accounts(parameters, unit_cost), "m", "d")
    surgery.write_pruned(dense, tmp_path / "pruned", surgery.Surgery(family, config, indices))
    before, after = (
        sum(p.numel() for p in checkpoint.load_model(folder, checkpoint.Numerics()).parameters())
        for folder in (dense, tmp_path / "pruned")
    )
    assert made.parameters == (before, after)
    assert made.ratio == (before - after) / before
