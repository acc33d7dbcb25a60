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
    prune = config.prune
    methods = (config.method, *config.compare)
    if other := [one.title for one in methods if one.unit == "weight"]:
        raise ConfigError(
            f"model_type {family.model_type!r} has experts; {other[0]} knows no model of them, choose activation, "
            "magnitude, taylor or random"
        )
    if config.recover.steps and config.recover.train == "mlp" and not family.widths(model_config, prune.parts):
        raise ConfigError("recover.train=mlp trains what lost units, and whole layers go; set recover.train=blocks")
    if experts.PART in prune.units:
        _check_as_units(config, family, model_config)


def _check_as_units(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    prune, methods = config.prune, (config.method, *config.compare)
    if not family.widths(model_config, (experts.PART,)):
        raise ConfigError(
            f"prune.units={list(prune.units)}: no layer of this model has experts; set prune.units=['attention']"
        )
    if other := [one.title for one in methods if not one.scores_experts]:
        raise ConfigError(f"{other[0]} does not score experts; choose activation, magnitude, taylor or random")
    allocations = ("uniform",) if prune.units == (experts.PART,) else ("uniform", "sensitivity")
    if prune.repair != "none" or prune.allocation not in allocations or prune.budget not in ("units", "parameters"):
        raise ConfigError(
            f"prune.units={list(prune.units)} with repair={prune.repair}, allocation={prune.allocation} and "
            f"budget={prune.budget}: nothing is solved anew for an expert that goes, all layers keep the same number, "
            "and a token goes through as many as before; set prune.repair=none, prune.allocation="
            f"{' or '.join(allocations)} and prune.budget=units or parameters"
        )
    if prune.protect:
        raise ConfigError(
            f"prune.protect={list(prune.protect)}: all layers have the same number of experts, so that none is left "
            "alone; leave it out"
        )
