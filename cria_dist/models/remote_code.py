"""A modelling file beside weights whose layers differ, for those who load them without this package.

``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`` runs it. Nothing here ever does:
``cria_dist.load_pruned`` gives the stock class its sizes itself.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from cria_dist.files import write_bytes
from cria_dist.models import attention
from cria_dist.models.family import family_of
from cria_dist.models.mlp import PART, MlpFamily, Takes, layers_differ
from cria_dist.models.widths import tell_heads
from cria_dist.records import Site

FILE = "modeling_pruned.py"
NORMS = """\
            for name in {names}:  # over all heads at once
                norm = layer.get_submodule(name)
                norm.weight = torch.nn.Parameter(norm.weight.new_empty(len(norm.weight) // groups * kept))
"""
"""What the file says where heads go through norms together."""
TASKS: Mapping[Takes, tuple[str, Any]] = {
    "tokens": ("ForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING),
    "sentences": ("ForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "images": ("ForImageClassification", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
}
"""By what a model takes: how ``transformers`` calls what it is for, and its classes by their configs."""
AUTO_MAPS = {takes: {f"AutoModel{task}": f"{Path(FILE).stem}.Pruned{task}"} for takes, (task, _) in TASKS.items()}
"""What config.json says of the file."""
MODELING = Template('''\
"""$model whose layers differ in size; written by cria_dist beside the weights, needs transformers alone.

    AutoModel$task.from_pretrained(path, trust_remote_code=True)

Every layer has the MLP neurons of `intermediate_size_per_layer` and the key-value heads of
`num_key_value_heads_per_layer` in config.json, where these are given; query heads per key-value head are the same
everywhere.
"""

import copy
from typing import Any

import torch
from transformers import $config, $model
from transformers.pytorch_utils import Conv1D

LAYERS = "$layers"
MAPS = {
    "mlp": $mlp,
    "attention": $attention,
}
"""Linear maps of a layer with units as outputs, and the one with units as inputs."""


class Pruned$task($model):
    """The stock class with the sizes of its layers."""

    config_class = $config

    def __init__(self, config):
        super().__init__(config)
        layers = self.get_submodule(LAYERS)
        for layer, kept in zip(layers, getattr(config, "intermediate_size_per_layer", None) or ()):
            resize(layer, *MAPS["mlp"], kept, config.$width)
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for layer, kept in zip(layers, getattr(config, "num_key_value_heads_per_layer", None) or ()):
            resize(layer, *MAPS["attention"], kept, groups)
            owner = layer.get_submodule(MAPS["attention"][1].rpartition(".")[0])
            tell_heads(owner, kept, config.num_attention_heads // groups)
$norms

def resize(layer, inputs, output, kept, units):
    """Replace linear maps of a layer by ones with the kept units."""
    for name in (*inputs, output):
        old = layer.get_submodule(name)
        before, after = old.weight.shape if isinstance(old, Conv1D) else reversed(old.weight.shape)
        if name == output:
            before = before // units * kept
        else:
            after = after // units * kept
        if isinstance(old, Conv1D):
            with old.weight.device:
                new = Conv1D(after, before).to(old.weight.dtype)
        else:
            new = torch.nn.Linear(before, after, old.bias is not None, old.weight.device, old.weight.dtype)
        layer.set_submodule(name, new)


$tell_heads''')


def with_modeling_file(target: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write the file where layers of a stock class differ; returns the config that names it, or no longer does.

    Args:
        target: folder of the checkpoint.
        config: its config.json.
    """
    ours = AUTO_MAPS.values()
    plain = {key: value for key, value in config.items() if key != "auto_map" or value not in ours}
    if not layers_differ(config):
        return plain
    family, settings = family_of(config), CONFIG_MAPPING[config["model_type"]]
    task, classes = TASKS[family.takes]
    model: Any = classes[settings]
    if not model.__module__.startswith("transformers."):
        return plain
    names = {"model": model.__name__, "config": settings.__name__, "task": task}
    places = {"layers": family.layers, "width": family.width_key}
    maps = {part: _maps(family, part) if part in family.parts else ((), "") for part in (PART, attention.PART)}
    norms = NORMS.format(names=family.head_norms) if family.head_norms else ""
    source = MODELING.substitute(names, **places, **maps, norms=norms, tell_heads=inspect.getsource(tell_heads))
    write_bytes(target / FILE, source.encode())
    return {**plain, "auto_map": AUTO_MAPS[family.takes]}


def _maps(family: MlpFamily, part: str) -> tuple[tuple[str, ...], str]:
    """Names within a layer of the maps that read the hidden state, and of the one that writes it."""
    modules, prefix = family.modules(Site(0, part)), f"{family.layers}.0."
    return tuple(name.removeprefix(prefix) for name in modules.inputs.values()), modules.output.removeprefix(prefix)
