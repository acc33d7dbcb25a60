"""Checkpoints whose layers differ in width, as a user loads them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import cria_dist
from cria_dist.errors import ConfigError
from cria_dist.models import surgery
from cria_dist.models.blocks import Block, BlockModel
from cria_dist.models.checkpoint import Numerics, count_parameters, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.loading import load_pruned
from cria_dist.models.tensor_parallel import tensor_ranks_problem
from cria_dist.models.writing import write_like
from cria_dist.records import Site

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256


@pytest.fixture(scope="module")
def uneven(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with 26 and 36 of its 48 units."""
    target = tmp_path_factory.mktemp("uneven") / "pruned"
    config = read_config(pico)
    kept = {"layer-000.mlp": tuple(range(26)), "layer-001.mlp": tuple(range(10, 46))}
    surgery.write_pruned(pico, target, surgery.Surgery(family_of(config), config, kept))
    return target


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def test_it_is_a_stock_model_that_generates(uneven: Path) -> None:
    model = cria_dist.load_pruned(uneven)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert [layer.mlp.gate_proj.out_features for layer in model.model.layers] == [26, 36]
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [26, 36]
    written = model.generate(TOKENS[:1], attention_mask=torch.ones(1, 20), max_new_tokens=3, min_new_tokens=3)
    assert written.shape == (1, 23)


def test_settings_go_to_from_pretrained(uneven: Path) -> None:
    assert load_pruned(str(uneven), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_it_saves_it_loads(uneven: Path, tmp_path: Path) -> None:
    model = load_pruned(uneven)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_pruned(tmp_path / "again")), logits(model))


def test_trained_weights_are_written_in_its_layout(uneven: Path, tmp_path: Path) -> None:
    model = load_model(uneven, Numerics())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    write_like(uneven, tmp_path / "recovered", model.state_dict())
    assert torch.equal(logits(load_pruned(tmp_path / "recovered")), logits(model))


def test_equal_widths_and_dense_models_load_as_ever(pico: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(pico)
    assert torch.equal(logits(load_pruned(pico)), logits(stock))


def test_stock_loading_refuses_it_aloud(uneven: Path) -> None:
    """What load_pruned exists for; the day this loads, it is not needed any more."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(uneven)


def test_the_shapes_are_known_without_loading(uneven: Path) -> None:
    config = read_config(uneven)
    assert family_of(config).widths(config) == {Site(0): 26, Site(1): 36}
    assert count_parameters(config) == sum(p.numel() for p in load_pruned(uneven).parameters())


def test_its_blocks_compute_what_it_does(uneven: Path) -> None:
    family = family_of(read_config(uneven))
    hidden = TOKENS
    for block in (Block(0, 1, 2), Block(1, 2, 2)):
        hidden = BlockModel(uneven, Numerics(), family, block)(hidden)
    model = load_model(uneven, Numerics())
    with torch.inference_mode():
        found = model.lm_head(model.model.norm(hidden))
    assert torch.equal(found, logits(model))


def test_ranks_cannot_share_it(uneven: Path) -> None:
    assert "different widths; take record.schedule=sweep" in (tensor_ranks_problem(read_config(uneven), 2) or "")


def test_no_checkpoint_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_pruned(tmp_path)


def test_importing_the_package_imports_no_torch() -> None:
    """It takes seconds, and the command line answers before."""
    script = "import sys, cria_dist; assert callable(cria_dist.load_pruned); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_biases_keep_their_width(make_model: Callable[..., Path], tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", mlp_bias=True)
    config = read_config(dense)
    kept = {"layer-000.mlp": tuple(range(8)), "layer-001.mlp": tuple(range(40))}
    surgery.write_pruned(dense, tmp_path / "pruned", surgery.Surgery(family_of(config), config, kept))
    assert [layer.mlp.up_proj.bias.numel() for layer in load_pruned(tmp_path / "pruned").model.layers] == [8, 40]
