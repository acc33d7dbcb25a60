"""DeciLM checkpoints: what vLLM and llama.cpp's converter read out of them, and that nothing is lost on the way."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import cria_dist
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.decilm import as_blocks, from_blocks, write_decilm
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned

TOKENS = torch.arange(20).reshape(1, -1) * 7 % 250


@pytest.fixture(scope="module")
def uneven(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in shards with 26 and 36 of its 48 units."""
    folder = tmp_path_factory.mktemp("decilm")
    dense = make_model(folder / "dense", shard_size="20KB", mlp_bias=True)
    config = checkpoint.read_config(dense)
    kept = {"layer-000.mlp": tuple(range(26)), "layer-001.mlp": tuple(range(10, 46))}
    write_pruned(dense, folder / "pruned", Surgery(family_of(config), config, kept))
    return folder / "pruned"


def vllm_widths(blocks: list[Any], hidden: int) -> list[int]:
    """How vLLM (models/nemotron_nas.py) gets a layer's width out of its config object."""

    def of(ffn: Any) -> int:
        if not hasattr(ffn, "ffn_mult"):
            return ffn.intermediate_size
        width = int(2 * ffn.ffn_mult * hidden / 3)
        return width if width % 256 == 0 else width + 256 - width % 256

    return [of(block.ffn) for block in blocks if not block.ffn.no_op and not block.attention.no_op]


def remote_config(directory: Path) -> Any:
    """The config object that ``trust_remote_code`` gives vLLM, made by the file itself."""
    spec = importlib.util.spec_from_file_location("configuration_decilm", directory / "configuration_decilm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = json.loads((directory / "config.json").read_text())
    assert settings["auto_map"] == {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    return module.DeciLMConfig(**settings)


def test_our_loader_gets_the_same_model_back(uneven: Path, tmp_path: Path) -> None:
    assert not write_decilm(uneven, checkpoint.read_config(uneven), tmp_path / "decilm")  # 26 is no multiple of 256
    again, first = cria_dist.load_pruned(tmp_path / "decilm"), cria_dist.load_pruned(uneven)
    assert type(again) is LlamaForCausalLM
    with torch.inference_mode():
        assert torch.equal(again(input_ids=TOKENS).logits, first(input_ids=TOKENS).logits)
    assert checkpoint.load_tokenizer(tmp_path / "decilm")("the cat") == checkpoint.load_tokenizer(uneven)("the cat")


def test_vllm_finds_every_width_and_head(uneven: Path, tmp_path: Path) -> None:
    write_decilm(uneven, checkpoint.read_config(uneven), tmp_path / "decilm")
    config = remote_config(tmp_path / "decilm")
    assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert vllm_widths(config.block_configs, config.hidden_size) == [26, 36]
    groups = [config.num_attention_heads // block.attention.n_heads_in_group for block in config.block_configs]
    assert groups == [2, 2]
    assert (config.mlp_bias, config.attention_bias, config.head_dim) == (True, False, 8)
    assert config.rope_parameters == checkpoint.read_config(uneven)["rope_parameters"]
    assert json.loads((tmp_path / "decilm" / "config.json").read_text())["rope_theta"] == 10000.0  # conversion/deci.py
    assert json.loads(config.to_json_string())["block_configs"][1]["ffn"]["intermediate_size"] == 36


@pytest.mark.parametrize(("widths", "hidden"), [([256, 1024], 576), ([14336, 11008], 4096), ([512, 768], 1000)])
def test_llama_cpp_reads_multiples_of_256(widths: list[int], hidden: int) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": max(widths),
        "intermediate_size_per_layer": widths,
    }
    blocks = as_blocks(config)
    found = []
    for block in blocks["block_configs"]:  # conversion/deci.py
        assert block["attention"]["n_heads_in_group"] == 4
        width = int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
        found.append(width if width % 256 == 0 else width + 256 - width % 256)
    assert found == widths
    assert from_blocks(blocks)["intermediate_size_per_layer"] == widths
    del config["intermediate_size_per_layer"]
    assert from_blocks(as_blocks(config))["intermediate_size_per_layer"] == [max(widths)] * 2


def test_what_blocks_cannot_say_is_refused(pico: Path) -> None:
    config = checkpoint.read_config(pico)
    with pytest.raises(ConfigError, match="has no DeciLM form; there is one for llama, mistral"):
        as_blocks({**config, "model_type": "qwen3"})
    with pytest.raises(ConfigError, match="different query heads"):
        as_blocks({**config, "num_key_value_heads_per_layer": [1, 2]})
    with pytest.raises(ConfigError, match="attends to everything"):
        as_blocks({**config, "model_type": "mistral", "sliding_window": 64})
    blocks = as_blocks(config)
    blocks["block_configs"][0]["ffn"]["no_op"] = True
    with pytest.raises(ConfigError, match="skipped blocks"):
        from_blocks(blocks)
