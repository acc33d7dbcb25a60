"""Decoders without an adapter of their own that follow Llama's names for a gated MLP, recognised by their modules."""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cria_dist.models.decoders import GatedMlpFamily
from cria_dist.models.mlp import PART, ModelDict


@dataclass(frozen=True, slots=True)
class GenericFamily(GatedMlpFamily):
    """A decoder whose MLPs are ``gate_proj``, ``up_proj`` and ``down_proj`` in every layer; only they are known.

    Attributes:
        biased: whether these maps carry biases.
    """

    biased: bool = False

    parts = (PART,)

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """Whether the maps carry biases."""
        return self.biased

    def _with_biases(self) -> dict[str, Any]:
        return {} if self.biased else GatedMlpFamily._with_biases(self)  # slots: super() knows another class


def generic_family(config: ModelDict) -> GenericFamily | None:
    """The adapter for a checkpoint of any model type, if the model's modules have the names, sizes and kinds."""
    return _generic_family(json.dumps(config, sort_keys=True))


@functools.lru_cache
def _generic_family(config_json: str) -> GenericFamily | None:
    config: dict[str, Any] = json.loads(config_json)
    family = GenericFamily(str(config.get("model_type")))
    if not {"hidden_size", "intermediate_size", "num_hidden_layers"} <= config.keys():
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    except (ValueError, KeyError):  # transformers has no such model, or none that predicts the next token
        return None
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    biased: set[bool] = set()
    for site in family.widths(config):
        names = [*family.modules(site).inputs.values(), family.modules(site).output]
        maps = [modules.get(name) for name in names]
        if not _are_all(names, modules):
            return None
        sizes = [(one.in_features, one.out_features) for one in maps if isinstance(one, torch.nn.Linear)]
        inner, outer = int(config["intermediate_size"]), int(config["hidden_size"])
        if sizes != [(outer, inner), (outer, inner), (inner, outer)]:
            return None
        biased |= {f"{name}.bias" in parameters for name in names}
    if family.embedding not in modules or len(biased) != 1:
        return None
    return GenericFamily(family.model_type, biased=biased.pop())


def _are_all(names: list[str], modules: dict[str, torch.nn.Module]) -> bool:
    """Whether an MLP has nothing but these maps: a norm between them would mix its neurons."""
    mlp = names[0].rpartition(".")[0]
    if mlp not in modules:
        return False
    owners = {f"{mlp}.{name.rpartition('.')[0]}" for name, _ in modules[mlp].named_parameters()}
    return owners == set(names)
