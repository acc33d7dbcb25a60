"""The modelling file beside weights whose layers differ, run by a process that has transformers and not us."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
import json, sys
sys.modules["cria_dist"] = None  # any import of it raises
import torch, transformers
from safetensors.numpy import save_file
tokens = torch.arange(20).reshape(1, -1) * 7 % 250
found = {}
for name in sys.argv[2:]:
    with open(f"{sys.argv[1]}/{name}/config.json") as file:
        (auto,) = json.load(file)["auto_map"]
    auto = getattr(transformers, auto)
    model = auto.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    model.save_pretrained(f"{sys.argv[1]}/{name}-saved")
    model = auto.from_pretrained(f"{sys.argv[1]}/{name}-saved", trust_remote_code=True).eval()
    with torch.inference_mode():
        found[f"{name}.logits"] = model(input_ids=tokens).logits.numpy()
        if model.can_generate():
            written = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
            found[f"{name}.written"] = written.numpy()
save_file(found, f"{sys.argv[1]}/found.safetensors")
"""
KEPT = {
    "neurons": {"layer-000.mlp": tuple(range(26)), "layer-001.mlp": tuple(range(10, 46))},
    "groups": {"layer-000.attention": (1,), "layer-001.attention": (0, 1)},
}
FAMILIES = ("llama", "gemma3_text", "qwen2", "qwen3")
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 48, "num_key_value_heads": None, "head_dim": None},
    "gpt_neox": {"num_key_value_heads": None},
    "glm": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None},
    "phi3": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "stablelm": {},
}
WITH_GROUPS = ("groups", *DECODERS, "bert", "distilbert")


@pytest.fixture(scope="module")
def folder(
    make_model: Callable[..., Path], make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Per family a checkpoint with two widths, some with two numbers of KV groups; all loaded elsewhere."""
    folder = tmp_path_factory.mktemp("remote")
    dense = {family: make_model(folder / f"dense-{family}", family, pad_token_id=0) for family in FAMILIES}
    dense["groups"] = dense["llama"]
    for family, own in DECODERS.items():
        dense[family] = make_model(folder / f"dense-{family}", family, **{"pad_token_id": 0, **own})
    for family in ("bert", "distilbert"):
        dense[family] = make_encoder(folder / f"dense-{family}", family, num_hidden_layers=2, hidden_dim=48)
    for name, source in dense.items():
        config = checkpoint.read_config(source)
        kept = KEPT["neurons"] | (KEPT["groups"] if name in WITH_GROUPS else {})
        write_pruned(source, folder / name, Surgery(family_of(config), config, kept))
    command = [sys.executable, "-c", STRANGER, str(folder), *dense]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("name", [*FAMILIES, *WITH_GROUPS])
def test_a_process_without_us_computes_and_writes_the_same(name: str, folder: Path) -> None:
    model = checkpoint.from_pretrained(folder / name)
    found = load_file(folder / "found.safetensors")
    with torch.inference_mode():
        ours = model(input_ids=TOKENS).logits.numpy()
        assert np.abs(found[f"{name}.logits"] - ours).max() <= 1e-5 * np.abs(ours).max()
        assert model.can_generate() == (f"{name}.written" in found)
        if model.can_generate():
            written = model.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
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
