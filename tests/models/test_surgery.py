"""Removing units equals silencing them, in memory and on disk, for every family."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cria_dist.errors import ConfigError, PlanError
from cria_dist.models import checkpoint, surgery
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.decoders import GatedMlpFamily
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.models.remote_code import AUTO_MAPS
from cria_dist.models.surgery import Surgery

MakeModel = Callable[..., Path]
Kept = dict[str, tuple[int, ...]]

WIDTH = 48
KEPT: Kept = {
    "layer-000.mlp": tuple(sorted({*range(0, 48, 2), 1, 47})),
    "layer-001.mlp": tuple(range(5, 31)),
}
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-bias": {"model_type": "llama", "mlp_bias": True},
    "llama-bias-untied": {"model_type": "llama", "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2"},
    "gemma3_text": {"model_type": "gemma3_text"},
    "gemma3_text-untied": {"model_type": "gemma3_text", "tie_word_embeddings": False},
}

STRANGER = """
import sys
sys.modules["cria_dist"] = None  # any import of it raises
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
target, *directories = sys.argv[1:]
tokens = torch.arange(40).reshape(2, 20) * 7 % 256
found = {}
for directory in directories:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert AutoTokenizer.from_pretrained(directory)("ab")["input_ids"]
    with torch.inference_mode():
        found[directory] = model.eval()(input_ids=tokens).logits
save_file(found, target)
"""


def operation(directory: Path, kept: Kept = KEPT, **settings: Any) -> Surgery:
    config = read_config(directory)
    return Surgery(family_of(config), config, kept, **settings)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.float()


def masked_logits(directory: Path, kept: Kept, repair: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Of the dense model with the removed units' columns zeroed; then the repair, put in by hand."""
    model = load_model(directory, Numerics())
    dense = logits(model)
    for layer, block in enumerate(model.model.layers):
        key = f"layer-{layer:03d}.mlp"
        down = block.mlp.down_proj
        removed = sorted(set(range(WIDTH)) - set(kept[key]))
        with torch.no_grad():
            down.weight[:, removed] = 0
            if repair is not None and f"{key}.weight" in repair:
                down.weight[:, list(kept[key])] = repair[f"{key}.weight"]
            if repair is not None and f"{key}.bias" in repair:
                down.bias = torch.nn.Parameter(repair[f"{key}.bias"])
    masked = logits(model)
    assert (masked - dense).abs().max() > 1e-2, "the removed units do nothing: this test could not fail"
    return masked


def assert_equals(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (found - expected).abs().max()


def make_repair(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """Replacement tensors of both sites, as the repair stage writes them."""
    generator = torch.Generator().manual_seed(3)
    folder.mkdir()
    made: dict[str, torch.Tensor] = {}
    for layer, key in enumerate(sorted(KEPT)):
        shape = (32, len(KEPT[key])) if part == "weight" else (32,)
        made[f"{key}.{part}"] = 0.1 * torch.randn(shape, generator=generator)
        save_file({f"model.layers.{layer}.mlp.down_proj.{part}": made[f"{key}.{part}"]}, folder / f"{key}.safetensors")
    return made


@pytest.fixture(scope="module", params=MODELS, ids=str)
def dense(request: pytest.FixtureRequest, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / request.param, **MODELS[request.param])


def test_every_family_is_tested() -> None:
    gated = {name: family for name, family in FAMILIES.items() if isinstance(family, GatedMlpFamily)}
    decoders = {name for name, family in gated.items() if "mlp" in family.parts}
    assert decoders == {model["model_type"] for model in MODELS.values()}


def test_the_coupled_tensors_are_all_that_know_the_width(dense: Path) -> None:
    """No other size of these models is 48: whatever has it along a dimension carries units."""
    config = read_config(dense)
    found = {
        name: list(tensor.shape).index(WIDTH)
        for name, tensor in load_file(dense / checkpoint.WEIGHTS).items()
        if WIDTH in tensor.shape
    }
    family = family_of(config)
    assert found == {
        name: dim for site in family.widths(config) for name, dim in family.coupled_tensors(site, config).items()
    }


def test_removing_equals_masking(dense: Path, tmp_path: Path) -> None:
    expected = masked_logits(dense, KEPT)
    model = load_model(dense, Numerics())
    before = logits(model)
    copy = surgery.pruned_copy(model, operation(dense))
    assert_equals(logits(copy), expected)
    assert torch.equal(logits(model), before), "the dense model was changed"
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense))
    written = load_model(tmp_path / "pruned", Numerics())
    assert_equals(logits(written), expected)
    assert written.config.intermediate_size == 26
    assert sum(p.numel() for p in copy.parameters()) == sum(p.numel() for p in written.parameters())


def test_removing_with_least_squares_equals_masking_with_new_columns(dense: Path, tmp_path: Path) -> None:
    repair = make_repair(tmp_path / "repair", "weight")
    expected = masked_logits(dense, KEPT, repair)
    repaired = operation(dense, repair=tmp_path / "repair")
    assert_equals(logits(surgery.pruned_copy(load_model(dense, Numerics()), repaired)), expected)
    surgery.write_pruned(dense, tmp_path / "pruned", repaired)
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), expected)


@pytest.mark.parametrize("name", ["llama", "llama-untied", "llama-bias"])
def test_removing_with_bias_equals_masking_with_bias(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", **MODELS[name])
    repair = make_repair(tmp_path / "repair", "bias")
    expected = masked_logits(dense, KEPT, repair)
    repaired = operation(dense, repair=tmp_path / "repair", output_bias=True)
    assert_equals(logits(surgery.pruned_copy(load_model(dense, Numerics()), repaired)), expected)
    surgery.write_pruned(dense, tmp_path / "pruned", repaired)
    assert read_config(tmp_path / "pruned")["mlp_bias"] is True
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), expected)


def test_bias_repair_is_refused_where_the_architecture_has_none(make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", "mistral")
    with pytest.raises(ConfigError, match=r"prune\.repair=bias.*'mistral'.*least_squares"):
        operation(dense, output_bias=True).pruned_config()


@pytest.mark.parametrize("output_bias", [False, True])
def test_shards_stay_shards(output_bias: bool, make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", shard_size="20KB")
    names = checkpoint.weight_files(dense)
    assert len(names) >= 3
    repair = make_repair(tmp_path / "repair", "bias") if output_bias else None
    expected = masked_logits(dense, KEPT, repair)
    done = operation(dense, repair=tmp_path / "repair" if output_bias else None, output_bias=output_bias)
    surgery.write_pruned(dense, tmp_path / "pruned", done)
    assert list(checkpoint.weight_files(tmp_path / "pruned")) == list(names)
    assert not (tmp_path / "pruned" / checkpoint.WEIGHTS).exists()
    for file, tensors in checkpoint.weight_files(tmp_path / "pruned").items():
        with safe_open(tmp_path / "pruned" / file, framework="pt") as handle:
            assert sorted(handle.keys()) == sorted(tensors)
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_checkpoint_keeps_its_dtype(dtype: str, make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", dtype=dtype)
    make_repair(tmp_path / "repair", "bias")
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, repair=tmp_path / "repair", output_bias=True))
    tensors = load_file(tmp_path / "pruned" / checkpoint.WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert "model.layers.0.mlp.gate_proj.bias" in tensors
    assert read_config(tmp_path / "pruned")["dtype"] == dtype
    column = load_file(dense / checkpoint.WEIGHTS)["model.layers.1.mlp.down_proj.weight"][:, 5]
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"][:, 0], column)


def test_config_keeps_every_other_key_and_the_side_files_come_along(pico: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(pico, dense)
    config = {**read_config(dense), "a_key_of_nobody": {"x": [1, None]}}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "LICENSE").write_text("free")
    (dense / "vocab.txt").write_text("a\nb\n")
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense))
    assert read_config(tmp_path / "pruned") == {**config, "intermediate_size": 26, "rope_theta": 10000.0}
    copied = {path.name for path in dense.iterdir()}
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == copied
    for name in copied - {"config.json", checkpoint.WEIGHTS}:
        assert (tmp_path / "pruned" / name).read_bytes() == (dense / name).read_bytes(), name


def test_a_rotary_embedding_is_also_said_as_before_transformers_5(make_model: MakeModel, tmp_path: Path) -> None:
    """A vLLM over transformers 4 reads these keys only, and transformers 5 must not be led astray by both."""
    scaled = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told = {**scaled, "original_max_position_embeddings": 16, "rope_theta": 500.0}
    dense = make_model(tmp_path / "dense", rope_parameters=told)
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense))
    found = read_config(tmp_path / "pruned")
    assert found["rope_theta"] == 500.0
    assert found["rope_scaling"] == {key: value for key, value in told.items() if key != "rope_theta"}
    assert load_model(tmp_path / "pruned", Numerics()).config.rope_parameters == told
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), masked_logits(dense, KEPT))


FULL = tuple(range(48))


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param({**KEPT, "layer-002.mlp": FULL[:26]}, id="a layer the model does not have"),
        pytest.param({**KEPT, "layer-001.attention": FULL[:26]}, id="a part the model does not have"),
        pytest.param({**KEPT, "layer-001.mlp": (*range(25), 48)}, id="an index beyond the width"),
        pytest.param({**KEPT, "layer-001.mlp": ()}, id="an empty layer"),
        pytest.param({**KEPT, "layer-001.mlp": (-1, *range(25))}, id="a negative index"),
        pytest.param({**KEPT, "layer-001.mlp": (0, *range(25))}, id="an index twice"),
        pytest.param({"layer-000.mlp": KEPT["layer-000.mlp"]}, id="a layer left out"),
        pytest.param({**KEPT, "nonsense": FULL[:26]}, id="a key that names no site"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(kept: Kept, pico: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        surgery.write_pruned(pico, tmp_path / "pruned", operation(pico, kept))
    assert not checkpoint.is_complete(tmp_path / "pruned")


UNEVEN: Kept = {**KEPT, "layer-001.mlp": tuple(range(3, 39))}
"""26 and 36 units: no stock class has that."""


def test_unequal_widths_equal_masking(dense: Path, tmp_path: Path) -> None:
    expected = masked_logits(dense, UNEVEN)
    assert_equals(logits(surgery.pruned_copy(load_model(dense, Numerics()), operation(dense, UNEVEN))), expected)
    surgery.write_pruned(dense, tmp_path / "pruned", operation(dense, UNEVEN))
    changed: dict[str, Any] = {
        "intermediate_size": 36,
        "intermediate_size_per_layer": [26, 36],
        "auto_map": AUTO_MAPS["tokens"],
    }
    if "rope_theta" in read_config(dense)["rope_parameters"]:  # Gemma 3 has two
        changed |= {"rope_theta": 10000.0}
    assert read_config(tmp_path / "pruned") == {**read_config(dense), **changed}
    written = load_model(tmp_path / "pruned", Numerics())
    assert_equals(logits(written), expected)
    assert type(written) is type(load_model(dense, Numerics()))


def test_unequal_widths_with_a_bias_equal_masking_with_bias(make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", shard_size="20KB")
    repair = make_repair(tmp_path / "repair", "bias")
    expected = masked_logits(dense, UNEVEN, repair)
    done = operation(dense, UNEVEN, repair=tmp_path / "repair", output_bias=True)
    surgery.write_pruned(dense, tmp_path / "pruned", done)
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), expected)


def test_unequal_widths_can_be_pruned_again_and_become_equal(pico: Path, tmp_path: Path) -> None:
    surgery.write_pruned(pico, tmp_path / "first", operation(pico, UNEVEN))
    again: Kept = {"layer-000.mlp": tuple(range(20)), "layer-001.mlp": tuple(range(10, 30))}
    surgery.write_pruned(tmp_path / "first", tmp_path / "second", operation(tmp_path / "first", again))
    assert read_config(tmp_path / "second") == {**read_config(pico), "intermediate_size": 20, "rope_theta": 10000.0}
    both = {key: tuple(UNEVEN[key][index] for index in kept) for key, kept in again.items()}
    assert_equals(logits(load_model(tmp_path / "second", Numerics())), masked_logits(pico, both))


def test_an_interrupted_write_is_continued(make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", shard_size="20KB")
    target = tmp_path / "pruned"
    surgery.write_pruned(dense, target, operation(dense))
    clean = {path.name: path.read_bytes() for path in target.iterdir()}
    weights = list(checkpoint.weight_files(target))
    for name in ("config.json", checkpoint.INDEX, weights[1]):
        (target / name).unlink()
    (target / f".{weights[1]}.tmp.1").write_bytes(b"half")
    assert not checkpoint.is_complete(target)
    untouched = (target / weights[0]).stat()
    surgery.write_pruned(dense, target, operation(dense))
    (target / f".{weights[1]}.tmp.1").unlink()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == clean
    again = (target / weights[0]).stat()
    assert (again.st_ino, again.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)


def test_loads_where_this_package_cannot_be_imported(make_model: MakeModel, tmp_path: Path) -> None:
    """One process for all families, a sharded checkpoint and one with new biases: it takes seconds to start."""
    expected: dict[str, torch.Tensor] = {}
    for name, model in MODELS.items():
        sharded = {"shard_size": "20KB"} if name == "llama-untied" else {}
        dense = make_model(tmp_path / "dense" / name, **model, **sharded)
        target = tmp_path / name
        surgery.write_pruned(dense, target, operation(dense))
        expected[str(target)] = masked_logits(dense, KEPT)
    repair = make_repair(tmp_path / "repair", "bias")
    dense, target = tmp_path / "dense" / "llama", tmp_path / "biased"
    surgery.write_pruned(dense, target, operation(dense, repair=tmp_path / "repair", output_bias=True))
    expected[str(target)] = masked_logits(dense, KEPT, repair)
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "found"), *expected]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert run.returncode == 0, run.stderr
    found = load_file(tmp_path / "found")
    for directory, theirs in expected.items():
        assert_equals(found[directory], theirs)


def test_a_real_model(stories: Path, tmp_path: Path) -> None:
    config = read_config(stories)
    kept = {f"layer-{layer:03d}.mlp": tuple(range(layer, 172, 2))[:80] for layer in range(config["num_hidden_layers"])}
    surgery.write_pruned(stories, tmp_path / "pruned", operation(stories, kept))
    model = load_model(stories, Numerics())
    with torch.no_grad():
        for key, block in zip(sorted(kept), model.model.layers, strict=True):
            block.mlp.down_proj.weight[:, sorted(set(range(172)) - set(kept[key]))] = 0
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), logits(model))
