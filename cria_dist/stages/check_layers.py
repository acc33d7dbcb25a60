"""Rules for methods that remove whole layers, checked before anything is computed."""

from collections.abc import Mapping
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.methods.layers import LayerMethod
from cria_dist.models.mlp import MlpFamily
from cria_dist.stages.decide_depth import layers_to_remove


def measured_sequences(method: LayerMethod, sequences: int) -> int:
    """Calibration sequences a method measures layers on; those after them are held out."""
    return sequences - round(method.held_out_share * sequences)


def check_layer_methods(
    config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], dense_parameters: int
) -> None:
    """There must be layers to spare, enough tokens of every sequence, and a schedule that sees whole hidden states.

    Raises:
        ConfigError: a method cannot work on this model or recording.
        PlanError: the ratio might remove every layer.
    """
    methods = [method for method in (config.method, *config.compare) if isinstance(method, LayerMethod)]
    if not methods:
        return
    first = methods[0].title
    if int(model_config["num_hidden_layers"]) == 1:
        raise ConfigError(f"{first} removes whole layers and the model has one; choose a method that removes neurons")
    layers_to_remove(config, family, model_config, dense_parameters)
    if config.record.schedule == "tensor":
        raise ConfigError(
            f"{first} reads hidden states, which record.schedule=tensor does not record; use auto, replicate, pipeline "
            "or sweep"
        )
    for method in methods:
        _check_tokens(config, method)
    _check_tolerances(config, family)


def _check_tolerances(config: RunConfig, family: MlpFamily) -> None:
    """Who stops by the perplexity needs a language model, and does not prune at the ratio of the others."""
    own = isinstance(config.method, LayerMethod) and config.method.tolerance is not None
    if own and family.takes != "tokens":
        raise ConfigError(
            f"{config.method.title} measures perplexity and model_type {family.model_type!r} takes {family.takes}; set "
            "method.stop=budget"
        )
    for method in config.compare:
        if isinstance(method, LayerMethod) and method.tolerance is not None:
            raise ConfigError(
                f"{method.title} decides by itself how many layers go, and compared methods prune at the same ratio; "
                "set stop=budget in compare"
            )


def _check_tokens(config: RunConfig, method: LayerMethod) -> None:
    sequences, tokens = config.data.calibration_sequences, config.record.tokens
    if tokens // sequences < method.fewest_tokens:
        raise ConfigError(
            f"{method.title} needs {method.fewest_tokens} sampled tokens of every calibration sequence; "
            f"record.tokens={tokens} of {sequences} sequences is fewer: raise it to {method.fewest_tokens * sequences}"
        )
    measured = measured_sequences(method, sequences)
    if method.held_out_share and not 0 < measured < sequences:
        raise ConfigError(
            f"{method.title} holds out {method.held_out_share:g} of data.calibration_sequences={sequences}, which "
            f"leaves {measured} to measure on and {sequences - measured} to judge by; raise data.calibration_sequences"
        )
