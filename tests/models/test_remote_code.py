"""The modelling file beside weights whose layers differ, run by a process that has transformers and not us."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned

TOKENS = torch.arange(20).reshape(1, -1) * 7 % 250
STRANGER = """
import sys
sys.modules["cria_dist"] = None  # any import of it raises
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM
tokens = torch.arange(20).reshape(1, -1) * 7 % 250
found = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    model.save_pretrained(f"{sys.argv[1]}/{name}-saved")
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}-saved", trust_remote_code=True).eval()
    with torch.inference_mode():
        found[f"{name}.logits"] = model(input_ids=tokens).logits.numpy()
        written = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    found[f"{name}.written"] = written.numpy()
save_file(found, f"{sys.argv[1]}/found.safetensors")
"""
KEPT = {
    "neurons": {"layer-000.mlp": tuple(range(26)), "layer-001.mlp": tuple(range(10, 46))},
    "groups": {"layer-000.attention": (1,), "layer-001.attention": (0, 1)},
}
FAMILIES = ("llama", "gemma3_text", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per family a checkpoint with two widths, and for Llama with two numbers of KV groups; all loaded elsewhere."""
    folder = tmp_path_factory.mktemp("remote")
    for family in FAMILIES:
        dense = make_model(folder / f"dense-{family}", family)
        config = checkpoint.read_config(dense)
        write_pruned(dense, folder / family, Surgery(family_of(config), config, KEPT["neurons"]))
        if family == "llama":
            write_pruned(dense, folder / "groups", Surgery(family_of(config), config, KEPT["neurons"] | KEPT["groups"]))
    command = [sys.executable, "-c", STRANGER, str(folder), *FAMILIES, "groups"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("name", [*FAMILIES, "groups"])
def test_a_process_without_us_computes_and_writes_the_same(name: str, folder: Path) -> None:
    model = checkpoint.from_pretrained(folder / name)
    found = load_file(folder / "found.safetensors")
    with torch.inference_mode():
        ours = model(input_ids=TOKENS).logits.numpy()
        written = model.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert np.abs(found[f"{name}.logits"] - ours).max() <= 1e-5 * np.abs(ours).max()
    assert np.array_equal(found[f"{name}.written"], written.numpy())


def test_what_it_saves_we_load(folder: Path) -> None:
    for name in ("llama", "groups"):
        again, first = (checkpoint.from_pretrained(folder / one).state_dict() for one in (f"{name}-saved", name))
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first)


def test_what_we_load_and_save_names_no_file_it_lacks(folder: Path, tmp_path: Path) -> None:
    checkpoint.from_pretrained(folder / "llama").save_pretrained(tmp_path)
    assert "auto_map" not in checkpoint.read_config(tmp_path)
    assert checkpoint.read_config(tmp_path)["intermediate_size_per_layer"] == [26, 36]


def test_the_file_is_there_only_where_layers_differ(folder: Path, tmp_path: Path) -> None:
    config = checkpoint.read_config(folder / "llama")
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM"}
    even = {"layer-000.mlp": tuple(range(20)), "layer-001.mlp": tuple(range(20))}
    write_pruned(folder / "llama", tmp_path / "even", Surgery(family_of(config), config, even))
    assert "auto_map" not in checkpoint.read_config(tmp_path / "even")
    assert not list((tmp_path / "even").glob("*.py"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "even")


def test_transformers_does_not_build_layers_of_different_widths_yet(pico: Path) -> None:
    """The day this fails, ``per_layer_config`` is honoured: write it, and the stock class needs no help of ours."""
    config = json.loads((pico / "config.json").read_text())
    widths = {"0": {"intermediate_size": 26}, "1": {"intermediate_size": 36}}
    assert built_widths(AutoConfig.for_model(**config, per_layer_config=widths)) != [26, 36]
    assert built_widths(AutoConfig.for_model(**config)) == [48, 48]


def built_widths(config: PreTrainedConfig) -> list[int] | None:
    """Widths of the layers that the stock class builds; None if it builds none."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except RuntimeError:  # transformers 5.23: the size of which layer?
        return None
    return [layer.mlp.gate_proj.out_features for layer in model.model.layers]
