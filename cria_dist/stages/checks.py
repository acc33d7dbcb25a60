"""Rules that the parts of a configuration must keep between them, checked before anything is computed."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.methods import Method
from cria_dist.methods.gates import GateMethod
from cria_dist.models import residual
from cria_dist.models.mlp import MlpFamily
from cria_dist.records import Site, Stage
from cria_dist.stages.check_experts import check_experts
from cria_dist.stages.check_residual import check_residual
from cria_dist.stages.footprint import in_units, itemsize

log = logging.getLogger(__name__)


def check_methods(config: RunConfig, widths: Mapping[Site, int], kept: Mapping[str, int]) -> None:
    """Every site must be large enough for every method, in the last round too."""
    scored = kept if config.prune.rounds > 1 else {site.key: width for site, width in widths.items()}
    for method in (config.method, *config.compare):
        for key, width in scored.items():
            smallest = method.smallest_site if Site.from_key(key).part == "mlp" else method.smallest_group_site
            if width < smallest:
                raise ConfigError(
                    f"{method.title} needs at least {smallest} units and {key} has {width}; lower method.neighbours"
                )
        if "gradients" in method.needs:
            _check_gradients(config, method)
        if isinstance(method, GateMethod):
            _check_gates(config, method)


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
    unknown = sorted({*config.prune.parts} - {*family.parts, *residual.PARTS})
    if unknown and not (units == ("mlp",) and all(method.unit == "layer" for method in methods)):
        reason = f" ({obstacle})" if (obstacle := family.obstacle(unknown[0])) else ""
        raise ConfigError(
            f"prune.units={list(units)}: of model_type {family.model_type!r}, {', '.join(family.parts)} can be pruned, "
            f"{unknown[0]} cannot{reason}; leave it out"
        )
    beside = [one.title for one in config.compare if one.unit != "mlp"]
    if config.prune.budget == "latency" and beside:
        raise ConfigError(
            f"prune.budget=latency counts what units inside layers cost, which {beside[0]} does not remove; leave it "
            "out of compare, or set prune.budget=parameters"
        )
    check_experts(config, family, model_config)
    if residual.UNIT in units:
        check_residual(config, family, model_config)
    other = [one.title for one in methods if not one.scores_groups]
    if other and units not in (("mlp",), (residual.UNIT,)):
        raise ConfigError(f"{other[0]} does not know prune.units={list(units)}; set it to mlp, or take another method")
    if config.prune.budget == "kv_cache" and family.takes != "tokens":
        raise ConfigError(
            f"prune.budget=kv_cache is of models that write text, and model_type {family.model_type!r} takes "
            f"{family.takes}; set prune.budget=units"
        )
    layers_go = "layer" in units or any(method.unit == "layer" for method in methods)
    if layers_go and model_config.get("scale_attn_by_inverse_layer_idx"):
        raise ConfigError(
            "this model divides what a layer attends to by the layer's number (scale_attn_by_inverse_layer_idx), so no "
            "layer can go; prune mlp or attention"
        )
    if units != ("mlp",) and config.record.schedule == "tensor":
        raise ConfigError(
            f"record.schedule=tensor shares MLPs only, and prune.units={list(units)}; set record.schedule=auto"
        )


def warn_of_memory(config: RunConfig, parameters: int, until: Stage) -> None:
    """Recording needs a block of layers at a time; what measures losses or gradients has the whole model in a worker.

    A warning, for ``record.memory_gb`` may be less than what there is.
    """
    needed, given = parameters * itemsize(config.model.dtype), config.record.memory_gb
    whole = ["evaluate (hence prune)"] if until == "evaluate" else []
    if config.prune.allocation != "uniform" and until not in ("record", "analyse"):
        whole.append(f"prune.allocation={config.prune.allocation}")
    if until != "record":
        whole += [one.title for one in (config.method, *config.compare) if one.needs & {"gradients", "gates"}]
    if given is not None and needed > given * 1e9 and whole:
        log.warning(
            "%s: a worker holds the whole model, %s, and record.memory_gb=%g; take a larger device, or stop before it "
            "(cria apply, cria recover) and evaluate elsewhere",
            whole[0],
            in_units(needed),
            given,
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
