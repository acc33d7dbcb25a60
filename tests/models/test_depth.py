"""Removing whole layers equals letting the hidden state pass them by, in memory and on disk, for every family."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from cria_dist.errors import PlanError
from cria_dist.models import checkpoint, depth, surgery
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.decoders import GatedMlpFamily
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.models.mlp import LAYER_WIDTHS
from cria_dist.models.numbering import computed_from_number
from cria_dist.models.surgery import Surgery

MakeModel = Callable[..., Path]

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
STAY = (0, 2, 5)
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-untied-bias": {"model_type": "llama", "tie_word_embeddings": False, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 6, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 3,
        "layer_types": None,
    },
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 6},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 6, "layer_types": SLIDING * 3},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3},
    "qwen3_moe-listed": {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [1, 2]},
    "qwen3_moe-every-second": {"model_type": "qwen3_moe", **EXPERTS, "decoder_sparse_step": 2},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 3, "pad_token_id": 0},
}
PLAIN = {"qwen3_moe-listed": [1], "qwen3_moe-every-second": [0, 1]}
"""Layers without experts among those that stay, by their new numbers."""

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 300,
}

STRANGER = """
import sys
sys.modules["cria_dist"] = None  # any import of it raises
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
target, *directories = sys.argv[1:]
tokens = torch.arange(40).reshape(2, 20) * 7 % 256
found = {}
for directory in directories:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(len(model.model.layers)))
    with torch.inference_mode():
        found[directory] = model(input_ids=tokens).logits
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        found[directory + "#cached"] = model.generate(tokens, use_cache=True, **settings)
        found[directory + "#plain"] = model.generate(tokens, use_cache=False, **settings)
save_file(found, target)
"""


def plan(stay: tuple[int, ...] = STAY, layers: int = 6) -> dict[str, tuple[int, ...]]:
    return {f"layer-{layer:03d}.block": (0,) if layer in stay else () for layer in range(layers)}


def operation(directory: Path, kept: dict[str, tuple[int, ...]] | None = None) -> Surgery:
    config = read_config(directory)
    return Surgery(family_of(config), config, plan() if kept is None else kept)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.float()


def passed_by(directory: Path, stay: tuple[int, ...] = STAY) -> torch.Tensor:
    """Logits of the dense model with identities in place of the other layers."""
    model = load_model(directory, Numerics())
    dense = logits(model)
    for index, layer in enumerate(model.model.layers):
        if index not in stay:
            layer.forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    masked = logits(model)
    assert (masked - dense).abs().max() > 1e-2, "the removed layers do nothing: this test could not fail"
    return masked


def assert_equals(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (found - expected).abs().max()


@pytest.fixture(scope="module", params=MODELS, ids=str)
def dense(request: pytest.FixtureRequest, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / request.param
    return make_model(folder, num_hidden_layers=6, **MODELS[request.param])


def test_every_family_is_tested() -> None:
    gated = {name for name, family in FAMILIES.items() if isinstance(family, GatedMlpFamily)}
    assert gated < {model["model_type"] for model in MODELS.values()}


def test_removing_equals_passing_by(dense: Path, tmp_path: Path) -> None:
    expected = passed_by(dense)
    assert_equals(logits(surgery.pruned_copy(load_model(dense, Numerics()), operation(dense))), expected)
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense))
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), expected)
    config = read_config(tmp_path / "pruned")
    assert config["num_hidden_layers"] == 3
    assert len(config.get("layer_types") or STAY) == 3
    assert config.get("mlp_only_layers", []) == PLAIN.get(dense.name, [])


def test_what_was_derived_from_a_layers_number_is_written_down(make_model: MakeModel, tmp_path: Path) -> None:
    """Layers from ``max_window_layers`` on slide; the config of an older transformers does not list them."""
    dense = make_model(tmp_path / "dense", num_hidden_layers=6, **MODELS["qwen2-sliding"])
    config = read_config(dense)
    for key in ("layer_types", "use_cache"):
        config.pop(key, None)
    assert depth.shallower(config, STAY)["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert depth.shallower(config, (4, 5))["layer_types"] == ["sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("stay", [(0, 2, 4), (1, 3)], ids=["only sliding", "only full"])
def test_one_kind_of_attention_may_be_left(stay: tuple[int, ...], make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=6, **MODELS["gemma3_text"])
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, plan(stay)))
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), passed_by(dense, stay))


def test_shards_stay_shards_and_empty_ones_go(make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", shard_size="20KB", num_hidden_layers=6)
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, plan((0,))))
    before, after = checkpoint.weight_files(dense), checkpoint.weight_files(tmp_path / "pruned")
    assert set(after) < set(before)
    assert {path.name for path in (tmp_path / "pruned").glob("*.safetensors")} == set(after)
    assert checkpoint.is_complete(tmp_path / "pruned")
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), passed_by(dense, (0,)))


@pytest.mark.parametrize("widths", [[20] * 6, [20, 9, 20, 30, 31, 20], [20, 21, 22, 23, 24, 25]], ids=str)
def test_neurons_and_layers_leave_together(widths: list[int], make_model: MakeModel, tmp_path: Path) -> None:
    """The layers that stay are as wide in the first two cases: then the stock class loads them."""
    dense = make_model(tmp_path / "dense", num_hidden_layers=6)
    neurons = {f"layer-{layer:03d}.mlp": tuple(range(layer, layer + width)) for layer, width in enumerate(widths)}
    model = load_model(dense, Numerics())
    with torch.no_grad():
        for key, layer in zip(sorted(neurons), model.model.layers, strict=True):
            layer.mlp.down_proj.weight[:, sorted(set(range(48)) - set(neurons[key]))] = 0
            if int(key[6:9]) not in STAY:
                layer.forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, {**plan(), **neurons}))
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), logits(model))
    config = read_config(tmp_path / "pruned")
    left = [widths[layer] for layer in STAY]
    assert config["intermediate_size"] == max(left)
    assert config.get(LAYER_WIDTHS) == (left if len(set(left)) > 1 else None)


def test_tensors_keep_their_bytes_under_their_new_numbers(make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=6, dtype="bfloat16")
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense))
    old, new = load_file(dense / checkpoint.WEIGHTS), load_file(tmp_path / "pruned" / checkpoint.WEIGHTS)
    assert torch.equal(new["model.layers.2.mlp.up_proj.weight"], old["model.layers.5.mlp.up_proj.weight"])
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"])
    assert len(new) == len(old) - 3 * sum(name.startswith("model.layers.0.") for name in old)
    assert operation(dense, plan(tuple(range(6)))).pruned_config() == read_config(dense)


def test_an_image_encoder_loses_layers_too(pico_vit: Path, tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    model = load_model(pico_vit, Numerics())
    model.vit.layers[1].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    surgery.write_pruned(pico_vit, tmp_path / "pruned", operation(pico_vit, plan((0, 2), layers=3)))
    with torch.inference_mode():
        found = load_model(tmp_path / "pruned", Numerics())(pixel_values=pixels).logits
        assert_equals(found, model(pixel_values=pixels).logits)


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(plan(layers=5), id="a layer left out"),
        pytest.param(plan(layers=7), id="a layer the model does not have"),
        pytest.param(plan(()), id="no layer left"),
        pytest.param({**plan(), "layer-000.block": (0, 1)}, id="two units of a layer"),
        pytest.param({**plan(), "layer-000.mlp": (0, 1)}, id="neurons of one layer only"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    kept: dict[str, tuple[int, ...]], make_model: MakeModel, tmp_path: Path
) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=6)
    with pytest.raises(PlanError, match="does not fit"):
        surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, kept))
    assert not checkpoint.is_complete(tmp_path / "pruned")


def test_loads_and_generates_where_this_package_cannot_be_imported(make_model: MakeModel, tmp_path: Path) -> None:
    """One process for all families, one of them in shards: it takes seconds to start. The cache is indexed by layer."""
    expected: dict[str, torch.Tensor] = {}
    for name, model in MODELS.items():
        sharded = {"shard_size": "20KB"} if name == "llama-untied-bias" else {}
        dense, target = make_model(tmp_path / "dense" / name, num_hidden_layers=6, **model, **sharded), tmp_path / name
        surgery.write_pruned(dense, target, operation(dense))
        expected[str(target)] = passed_by(dense)
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "found"), *expected]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert run.returncode == 0, run.stderr
    found = load_file(tmp_path / "found")
    for directory, theirs in expected.items():
        assert_equals(found[directory], theirs)
        assert torch.equal(found[f"{directory}#cached"], found[f"{directory}#plain"]), directory


@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_computes_goes_by_no_number(name: str) -> None:
    config = AutoConfig.for_model(**SHAPE | MODELS[name]).to_dict()
    assert not computed_from_number(config, family_of(config))


def test_a_layer_that_goes_by_its_number_is_found() -> None:
    config = AutoConfig.for_model(**SHAPE, model_type="diffllama").to_dict()
    assert computed_from_number(config, family_of(config)) == "self_attn.lambda_init"
