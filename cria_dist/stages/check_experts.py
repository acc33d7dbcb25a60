"""Rules for mixtures of experts, checked before anything is computed."""

from collections.abc import Mapping
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import experts
from cria_dist.models.mlp import MlpFamily


def expert_tensors(family: MlpFamily, model_config: Mapping[str, Any]) -> list[str]:
    """What a checkpoint calls the maps of all its experts."""
    sites = family.widths(model_config, (experts.PART,)) if experts.PART in family.parts else {}
    tensors = [
        (f"{family.modules(site).output}.{leaf}", units) for site, units in sites.items() for leaf in experts.MAPS
    ]
    return [one for name, units in tensors for names in family.pieces(name, (units,)) for one in names]


def check_experts(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """What can be done with a model of experts, and with experts as units.

    Raises:
        ConfigError: something else is asked for.
    """
    if experts.PART not in family.parts:
        return
    what, prune = f"model_type {family.model_type!r} has experts", config.prune
    if "layer" in prune.units and not all(
        experts.has_experts(model_config, layer) for layer in range(int(model_config["num_hidden_layers"]))
    ):
        raise ConfigError(f"{what} in some layers, told by their numbers, so no layer can go; leave layer out")
    if config.recover.steps and config.recover.strategy == "fsdp2":
        raise ConfigError(f"{what}, which recover.strategy=fsdp2 cannot write; set recover.strategy=ddp")
    methods = (config.method, *config.compare)
    if other := [one.title for one in methods if one.unit != "mlp"]:
        raise ConfigError(f"{what}; {other[0]} knows no model of them, choose activation, magnitude, taylor or random")
    if experts.PART not in prune.units:
        return
    if other := [one.title for one in methods if not one.scores_experts]:
        raise ConfigError(f"{other[0]} does not score experts; choose activation, magnitude, taylor or random")
    if prune.repair != "none" or prune.allocation != "uniform" or prune.budget not in ("units", "parameters"):
        raise ConfigError(
            f"prune.units={list(prune.units)} with repair={prune.repair}, allocation={prune.allocation} and "
            f"budget={prune.budget}: nothing is solved anew for an expert that goes, all layers keep the same number, "
            "and a token goes through as many as before; set prune.repair=none, prune.allocation=uniform and "
            "prune.budget=units or parameters"
        )
