"""Sentence encoders: removing neurons equals silencing them, in memory and on disk; blocks equal the whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, surgery
from cria_dist.models.blocks import BlockModel, partition
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.records import Site

KEPT = {f"layer-{layer:03d}.mlp": tuple(range(layer, 48, 2)) for layer in range(3)}
ENCODERS = [name for name, family in FAMILIES.items() if family.takes == "sentences"]


@pytest.fixture(params=ENCODERS)
def folder(request: pytest.FixtureRequest, make_encoder: Callable[..., Path], tmp_path: Path) -> Path:
    own = {"hidden_dim": 48} if request.param == "distilbert" else {}
    return make_encoder(tmp_path / "model", request.param, **own)


@pytest.fixture
def tokens_ST() -> torch.Tensor:
    return torch.randint(2, 256, (3, 20), generator=torch.Generator().manual_seed(0))


def test_removing_neurons_equals_silencing_them(folder: Path, tokens_ST: torch.Tensor, tmp_path: Path) -> None:
    config, family = read_config(folder), family_of(read_config(folder))
    masked = load_model(folder, Numerics())
    operation = surgery.Surgery(family, config, KEPT)
    surgery.write_pruned(folder, tmp_path / "pruned", operation)
    with torch.inference_mode():
        dense = masked(input_ids=tokens_ST).logits.clone()
        in_memory = surgery.pruned_copy(load_model(folder, Numerics()), operation)
        for key, kept in KEPT.items():
            output = masked.get_submodule(family.modules(Site.from_key(key)).output)
            output.weight[:, sorted(set(range(48)) - set(kept))] = 0
        expected = masked(input_ids=tokens_ST).logits
        on_disk = load_model(tmp_path / "pruned", Numerics())
        assert (expected - dense).abs().max() > 1e-2
        for found in (in_memory, on_disk):
            torch.testing.assert_close(found(input_ids=tokens_ST).logits, expected, rtol=1e-5, atol=1e-5)
    removed = sum(48 - len(kept) for kept in KEPT.values()) * family.unit_cost(Site(0), config)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (masked, on_disk)]
    assert counts[0] - counts[1] == removed
    assert counts[0] == checkpoint.count_parameters(config)


def test_blocks_in_turn_are_the_whole_encoder(folder: Path, tokens_ST: torch.Tensor) -> None:
    family, config = family_of(read_config(folder)), read_config(folder)
    (whole,) = partition(3, 1)
    expected = BlockModel(folder, Numerics(), family, whole)(tokens_ST)
    hidden = tokens_ST
    for block in partition(3, 3):
        hidden = BlockModel(folder, Numerics(), family, block)(hidden)
    assert torch.equal(hidden, expected)
    stock = getattr(load_model(folder, Numerics()), str(config["model_type"]))
    with torch.inference_mode():
        torch.testing.assert_close(stock(input_ids=tokens_ST).last_hidden_state, expected)


def test_a_config_without_positions_is_damaged() -> None:
    with pytest.raises(ConfigError, match=r"config\.json is damaged \(it has no .max_position_embeddings.\); take"):
        family_of({"model_type": "bert"}).longest({"model_type": "bert"})


def test_no_token_lies_behind_the_last_position(folder: Path) -> None:
    """64 positions, of which RoBERTa gives none to the first two rows of its embedding."""
    config, model = read_config(folder), load_model(folder, Numerics())
    longest = family_of(config).longest(config)
    assert longest == {"bert": 64, "distilbert": 64, "roberta": 62}[config["model_type"]]
    with torch.inference_mode():
        model(input_ids=torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))
