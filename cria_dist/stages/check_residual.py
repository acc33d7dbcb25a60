"""Rules for dimensions of the residual stream as units, checked before anything is computed."""

from collections.abc import Mapping
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import attention, residual
from cria_dist.models.family import RESIDUAL
from cria_dist.models.mlp import MlpFamily


def check_residual(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """The family must be one whose stream is known, its layers alike, and every method one that scores the stream.

    Raises:
        ConfigError: something else is asked for.
    """
    known, alike = family.model_type in RESIDUAL, attention.LAYER_KV_HEADS not in model_config
    if not (known and alike):
        reason = "its layers have different heads" if known else family.obstacle(residual.UNIT)
        raise ConfigError(
            f"prune.units=['residual'] is for {', '.join(RESIDUAL)}, and model_type is {family.model_type!r}: "
            f"{reason}; prune mlp or attention"
        )
    other = [one.title for one in (config.method, *config.compare) if not one.scores_residual]
    if other:
        raise ConfigError(
            f"{other[0]} scores what one layer computes, and prune.units=['residual'] runs through all; take "
            "method.name=activation or random"
        )
