"""Rules that the parts of a configuration must keep between them, checked before anything is computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.maths.allocation import width_after_round
from cria_dist.methods import Method
from cria_dist.methods.gates import GateMethod
from cria_dist.models import experts, residual
from cria_dist.models.mlp import MlpFamily
from cria_dist.models.numbering import computed_from_number
from cria_dist.records import Site
from cria_dist.stages.budget import multiple_of
from cria_dist.stages.check_experts import check_experts
from cria_dist.stages.check_residual import check_residual


def check_methods(config: RunConfig, widths: Mapping[Site, int], kept: Mapping[str, int]) -> None:
    """Every site must be large enough for every method; compared ones score the dense model, in one round."""
    dense = {site.key: width for site, width in widths.items()}
    _check_sizes(config.method, _least_scored(config, widths, kept))
    for method in config.compare:
        _check_sizes(method, dense)
    for method in (config.method, *config.compare):
        if "gradients" in method.needs:
            _check_gradients(config, method)
        if isinstance(method, GateMethod):
            _check_gates(config, method)


def _least_scored(config: RunConfig, widths: Mapping[Site, int], kept: Mapping[str, int]) -> dict[str, int]:
    """Units per site that enter the last round, or the fewest that may where the budget is not spread evenly."""
    prune = config.prune
    if prune.rounds == 1:
        return {site.key: width for site, width in widths.items()}
    if prune.allocation != "uniform":
        return dict(kept)
    return {
        site.key: width_after_round(width, kept[site.key], prune.rounds, prune.rounds - 2, multiple_of(prune, site))
        for site, width in widths.items()
    }


def _check_sizes(method: Method, scored: Mapping[str, int]) -> None:
    for key, width in scored.items():
        mlp = Site.from_key(key).part == "mlp"
        smallest = method.smallest_site if mlp else method.smallest_group_site
        if width < smallest:
            raise ConfigError(
                f"{method.title} needs at least {smallest} units and {key} has {width} when it is scored; "
                + ("lower method.neighbours" if mlp else "take another method or set prune.units=mlp")
            )


def _check_gradients(config: RunConfig, method: Method) -> None:
    """There must be as many sequences as gradients are taken of, in a data type that holds small numbers."""
    wanted, available = method.gradient_sample.sequences, config.data.calibration_sequences
    if wanted > available:
        raise ConfigError(
            f"{method.title} takes gradients of {wanted} sequences and there are {available} calibration sequences; "
            f"lower sequences of the method or raise data.calibration_sequences"
        )
    if config.model.dtype == "float16":
        raise ConfigError(
            f"{method.title} needs gradients, most of which float16 rounds to zero; set model.dtype=bfloat16 or float32"
        )


def _check_gates(config: RunConfig, method: GateMethod) -> None:
    """There must be a batch of different sequences or labelled examples to learn from."""
    examples = config.data.calibration_sequences
    if config.data.labelled:
        if examples < method.batch_sequences:
            raise ConfigError(
                f"{method.title} learns from batches of {method.batch_sequences} examples and there are {examples} "
                "calibration examples; lower batch_sequences of the method or raise data.calibration_sequences"
            )
        return
    tokens = examples * config.data.sequence_length
    available = tokens // method.sequence_length
    if available < method.batch_sequences:
        raise ConfigError(
            f"{method.title} learns from batches of {method.batch_sequences} sequences of {method.sequence_length} "
            f"tokens, and {tokens} calibration tokens are {available}; lower batch_sequences or sequence_length of the "
            "method, or raise data.calibration_sequences"
        )


def check_units(config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """What is to be removed must be known of the family, and of every method."""
    units, methods = config.prune.units, (config.method, *config.compare)
    _check_known(config, family)
    other = [one for one in methods if one.unit != "mlp"]
    if config.prune.budget == "latency" and other:
        remedy = "take another method" if other[0] is config.method else "leave it out of compare"
        raise ConfigError(
            f"prune.budget=latency counts what units inside layers cost, which {other[0].title} does not remove; "
            f"{remedy}, or set prune.budget=units, parameters or macs with prune.allocation=uniform"
        )
    check_experts(config, family, model_config)
    if residual.UNIT in units:
        check_residual(config, family, model_config)
    lost = [one.title for one in methods if not one.scores_groups]
    if lost and units not in (("mlp",), (residual.UNIT,)):
        raise ConfigError(f"{lost[0]} does not know prune.units={list(units)}; set it to mlp, or take another method")
    if config.prune.budget == "kv_cache" and family.takes != "tokens":
        raise ConfigError(
            f"prune.budget=kv_cache is of models that write text, and model_type {family.model_type!r} takes "
            f"{family.takes}; set prune.budget=units"
        )
    if "layer" in units or any(method.unit == "layer" for method in methods):
        _check_numbering(family, model_config)
    if units != ("mlp",) and config.record.schedule == "tensor":
        raise ConfigError(
            f"record.schedule=tensor shares MLPs only, and prune.units={list(units)}; set record.schedule=auto"
        )


def _check_numbering(family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """Layers that stay are numbered anew."""
    if what := computed_from_number(model_config, family):
        raise ConfigError(
            f"what a layer of this model computes goes by the layer's number ({what}), so no layer can go; prune "
            "mlp or attention"
        )


def _check_known(config: RunConfig, family: MlpFamily) -> None:
    """The family must have such units, but where whole layers go."""
    units, methods = config.prune.units, (config.method, *config.compare)
    unknown = sorted({*config.prune.parts} - {*family.parts, *residual.PARTS})
    if not unknown or (units == ("mlp",) and all(method.unit == "layer" for method in methods)):
        return
    if experts.PART in family.parts and unknown == ["mlp"]:
        raise ConfigError(
            f"prune.units={list(units)}: model_type {family.model_type!r} is a mixture, whose neurons stay; set "
            "prune.units=['experts'] with method.name=activation (or magnitude, taylor, random; in compare too) and "
            "prune.repair=none, or set prune.units=['attention']"
        )
    reason = f" ({obstacle})" if (obstacle := family.obstacle(unknown[0])) else ""
    raise ConfigError(
        f"prune.units={list(units)}: of model_type {family.model_type!r}, {', '.join(family.parts)} can be pruned, "
        f"{unknown[0]} cannot{reason}; leave it out"
    )


def check_sampling(config: RunConfig, positions: int) -> None:
    """There must be as many tokens as are to be sampled; of every sequence or image, the first is never taken."""
    data, record = config.data, config.record
    available = data.calibration_sequences * (positions - 1)
    if record.tokens > available:
        raise ConfigError(
            f"record.tokens={record.tokens} is more than the {available} tokens of {data.calibration_sequences} "
            f"calibration sequences without their first; lower it or raise data.calibration_sequences"
        )


def check_not_foreign(folder: Path) -> None:
    """A folder with other files is somebody's: nothing is written there."""
    foreign = sorted(entry.name for entry in folder.glob("[!.]*"))
    if foreign and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds {foreign[0]!r} but no config.json of a run; choose another run.folder")
