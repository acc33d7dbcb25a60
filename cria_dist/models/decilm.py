"""DeciLM: the form of a Llama with layers of different widths that vLLM serves and llama.cpp's converter reads.

config.json then has ``block_configs``, one per layer, as Nemotron-NAS does. vLLM (``models/nemotron_nas.py``) takes
``ffn_mult`` where there is one and rounds it up to a multiple of 256, else ``intermediate_size``; llama.cpp's converter
(``conversion/deci.py``) knows ``ffn_mult`` only. So ``ffn_mult`` goes out where every width is such a multiple. Query
heads are the same in all layers for both.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cria_dist.errors import ConfigError
from cria_dist.files import write_bytes, write_json
from cria_dist.models.attention import LAYER_KV_HEADS, attention_shape
from cria_dist.models.mlp import LAYER_WIDTHS, ModelDict
from cria_dist.models.names import rotation_of_old

MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
FAMILIES = ("llama", "mistral")
STEP = 256
"""``ffn_mult`` says multiples of this width."""
CONFIGURATION_FILE = "configuration_decilm.py"
CONFIGURATION = '''\
"""Config of a Llama with one block config per layer; written by cria_dist, needs transformers alone."""

from transformers import {base}


class Block(dict):
    """A part of a block config: its entries are attributes too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig({base}):
    """The stock config with ``block_configs``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **settings):
        super().__init__(**settings)
        parts = [{{part: Block(entries) for part, entries in block.items()}} for block in block_configs]
        self.block_configs = [Block(block) for block in parts]
'''
BASES = {"llama": "LlamaConfig", "mistral": "MistralConfig"}
NOT_COPIED = (".py", ".md", ".gguf")


def write_decilm(directory: Path, config: ModelDict, target: Path) -> bool:
    """Write a checkpoint as DeciLM: its weights and tokenizer as they are, and a config with blocks.

    Args:
        directory: the checkpoint.
        config: its config.json.
        target: folder to fill; complete when it holds ``config.json``, which is written last.

    Returns:
        Whether llama.cpp's converter reads it too, and not vLLM alone.

    Raises:
        ConfigError: blocks cannot say what this model is.
    """
    blocks = as_blocks(config)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.suffix not in NOT_COPIED and path.name not in ("config.json", "plan.json"):
            shutil.copyfile(path, target / path.name)
    source = CONFIGURATION.format(base=BASES[str(config["model_type"])])
    write_bytes(target / CONFIGURATION_FILE, source.encode())
    write_json(target / "config.json", blocks)
    return "ffn_mult" in blocks["block_configs"][0]["ffn"]


def as_blocks(config: ModelDict) -> dict[str, Any]:
    """The config with blocks.

    Raises:
        ConfigError: another family, or a number of query heads per layer.
    """
    family = config["model_type"]
    if family not in FAMILIES:
        raise ConfigError(f"model family {family!r} has no DeciLM form; there is one for {', '.join(FAMILIES)}")
    if LAYER_KV_HEADS in config:
        raise ConfigError(
            "the layers have different query heads, for which DeciLM has no word; export GGUF for llama.cpp, "
            "or load it with cria_dist.load_pruned"
        )
    if config.get("sliding_window"):
        raise ConfigError(f"sliding_window={config['sliding_window']}: DeciLM attends to everything")
    widths = config.get(LAYER_WIDTHS) or [config["intermediate_size"]] * int(config["num_hidden_layers"])
    shape = attention_shape(config)
    attention = {"n_heads_in_group": shape.queries, "no_op": False, "replace_with_linear": False}
    blocks = [{"attention": attention, "ffn": ffn} for ffn in _feed_forward(widths, shape.hidden)]
    kept = {key: value for key, value in config.items() if key not in (LAYER_WIDTHS, "auto_map")}
    return {
        **kept,
        **rotation_of_old(config),
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{Path(CONFIGURATION_FILE).stem}.DeciLMConfig"},
        "block_configs": blocks,
        "head_dim": shape.head_dim,
        "model_type": MODEL_TYPE,
    }


def _feed_forward(widths: Sequence[int], hidden: int) -> list[dict[str, Any]]:
    parts = {"no_op": False, "replace_with_linear": False}
    if any(width % STEP for width in widths):
        return [{"intermediate_size": width, **parts} for width in widths]
    return [{"ffn_mult": 3 * width / (2 * hidden), "intermediate_size": width, **parts} for width in widths]


def from_blocks(config: ModelDict) -> ModelDict:
    """The config as our loader and the stock classes read it; any other config as it is.

    Raises:
        ConfigError: a block is skipped or has its own number of heads per group.
    """
    if config.get("model_type") != MODEL_TYPE:
        return config
    blocks: Sequence[Mapping[str, Any]] = config["block_configs"]
    sizes = {block["attention"].get("n_heads_in_group") for block in blocks}
    if len(sizes) > 1 or None in sizes or any(part.get("no_op") for block in blocks for part in block.values()):
        raise ConfigError(
            "DeciLM with skipped blocks, or a number of heads per group for every layer, is not known here"
        )
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    family = "llama" if hidden % heads == 0 else "mistral"
    widths = [_width(block["ffn"], hidden) for block in blocks]
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "block_configs")}
    plain = {
        **kept,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "intermediate_size": max(widths),
        LAYER_WIDTHS: widths,
        "model_type": family,
        "num_key_value_heads": heads // next(iter(sizes)),
    }
    return plain | ({"sliding_window": None} if family == "mistral" else {})


def _width(ffn: Mapping[str, Any], hidden: int) -> int:
    """As vLLM and llama.cpp compute it."""
    if (multiplier := ffn.get("ffn_mult")) is None:
        return int(ffn["intermediate_size"])
    return -(int(2 * multiplier * hidden / 3) // -STEP) * STEP
