"""A modelling file beside weights whose layers differ, for those who load them without this package.

``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`` runs it. Nothing here ever does:
``cria_dist.load_pruned`` gives the stock class its sizes itself.
"""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from cria_dist.files import write_bytes
from cria_dist.models.decoders import GatedMlpFamily
from cria_dist.models.family import family_of
from cria_dist.models.mlp import layers_differ

FILE = "modeling_pruned.py"
AUTO_MAP = {"AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM"}
"""What config.json says of the file."""
MODELING = Template('''\
"""$model whose layers differ in size; written by cria_dist beside the weights, needs transformers alone.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

Every layer has the MLP neurons of `intermediate_size_per_layer` and the key-value heads of
`num_key_value_heads_per_layer` in config.json, where these are given; query heads per key-value head are the same
everywhere.
"""

import torch
from transformers import $config, $model


class PrunedForCausalLM($model):
    """The stock class with the sizes of its layers."""

    config_class = $config

    def __init__(self, config):
        super().__init__(config)
        for layer, width in zip(self.model.layers, getattr(config, "intermediate_size_per_layer", None) or ()):
            resize(layer.mlp, width, outputs=("gate_proj", "up_proj"), inputs=("down_proj",))
        queries = config.num_attention_heads // config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer, kept in zip(self.model.layers, getattr(config, "num_key_value_heads_per_layer", None) or ()):
            resize(layer.self_attn, kept * size, outputs=("k_proj", "v_proj"))
            resize(layer.self_attn, kept * queries * size, outputs=("q_proj",), inputs=("o_proj",))


def resize(module, width, outputs=(), inputs=()):
    """Replace linear maps of a module by ones with `width` outputs or inputs."""
    for names, side in ((outputs, "out_features"), (inputs, "in_features")):
        for name in names:
            old = getattr(module, name)
            sizes = {"in_features": old.in_features, "out_features": old.out_features, side: width}
            new = torch.nn.Linear(**sizes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
            setattr(module, name, new)
''')


def with_modeling_file(target: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write the file where layers of a decoder differ; returns the config that names it, or no longer does.

    Args:
        target: folder of the checkpoint.
        config: its config.json.
    """
    plain = {key: value for key, value in config.items() if (key, value) != ("auto_map", AUTO_MAP)}
    if not layers_differ(config) or not isinstance(family_of(config), GatedMlpFamily):
        return plain
    settings = CONFIG_MAPPING[config["model_type"]]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[settings]
    names = {"model": model.__name__, "config": settings.__name__}
    write_bytes(target / FILE, MODELING.substitute(names).encode())
    return {**plain, "auto_map": AUTO_MAP}
