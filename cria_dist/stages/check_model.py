"""Configuration and model held against each other: all that can be checked without text and without weights."""

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.records import Stage
from cria_dist.stages import cautions, checks
from cria_dist.stages.budget import fewest_units, final_widths, multiple_of
from cria_dist.stages.check_layers import check_layer_methods
from cria_dist.stages.check_recovery import check_recovery
from cria_dist.stages.check_takes import check_takes
from cria_dist.stages.decide_weights import check_weight_methods


def check_model(
    config: RunConfig, family: MlpFamily, model_config: ModelDict, dense_parameters: int, until: Stage
) -> None:
    """What is asked for must be possible with this model; what is unwise is said.

    Args:
        config: the run.
        family: adapter of the model's family.
        model_config: config.json of the dense model.
        dense_parameters: its parameters.
        until: last stage that is wanted.

    Raises:
        ConfigError: what is asked for cannot be done.
        PlanError: the ratio would empty a layer.
    """
    check_takes(config, family, model_config, until)
    checks.check_units(config, family, model_config)
    _check_allocation(config, family, model_config, dense_parameters)
    check_layer_methods(config, family, model_config, dense_parameters)
    check_weight_methods(config, family, model_config, dense_parameters)
    check_recovery(config, family, model_config)
    checks.check_sampling(config, family.positions(model_config, config.data.sequence_length))
    cautions.warn_of_few_tokens(config, family, model_config)


def _check_allocation(config: RunConfig, family: MlpFamily, model_config: ModelDict, dense_parameters: int) -> None:
    """There must be widths that the budget allows, and that every method can score."""
    evenly, methods = config.prune.allocation == "uniform", (config.method, *config.compare)
    if evenly and all(method.unit != "mlp" for method in methods):
        return
    widths = family.widths(model_config, config.prune.parts)
    for site, width in widths.items():
        if multiple_of(config.prune, site) > width:
            raise ConfigError(
                f"prune.multiple={config.prune.multiple} is more than the {width} units of {site.key}; lower "
                f"prune.multiple to at most {width}"
            )
    kept = (final_widths if evenly else fewest_units)(config, family, model_config, dense_parameters)
    family.narrowed(model_config, kept, config.prune.repair == "bias")
    checks.check_methods(config, widths, kept)
    if evenly:
        cautions.warn_of_rounding(config, family, model_config, dense_parameters, kept)
