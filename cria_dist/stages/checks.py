"""Rules that the parts of a configuration must keep between them, checked before anything is computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.methods import Method
from cria_dist.methods.gates import GateMethod
from cria_dist.models import attention, checkpoint, residual
from cria_dist.models.mlp import MlpFamily
from cria_dist.models.shapes import stored_tensors
from cria_dist.models.streaming import DTYPES
from cria_dist.records import Site
from cria_dist.stages.check_experts import check_experts, expert_tensors
from cria_dist.stages.check_residual import check_residual
from cria_dist.stages.estimate import RECORDED, bytes_of_run
from cria_dist.stages.footprint import in_units


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


def check_tensors(model_dir: Path, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """The checkpoint must have what is to be pruned, under the names of the stock class, in types that are written."""
    there = stored_tensors(model_dir)
    odd = [f"{name} is {tensor.dtype}" for name, tensor in there.items() if tensor.dtype not in DTYPES.values()]
    if odd:
        raise ConfigError(
            f"{model_dir}: {odd[0]}, and checkpoints are written in {', '.join(DTYPES.values())}; give the checkpoint "
            "in float32, bfloat16 or float16"
        )
    _check_sizes(model_dir, family, model_config)
    wanted = [name for site in family.widths(model_config) for name in family.coupled_tensors(site, model_config)]
    shapes = {family.on_disk(name): one.shape for name, one in checkpoint.empty_model(model_config).named_parameters()}
    for name in sorted(shapes.keys() & there.keys()):
        if tuple(shapes[name]) != tuple(there[name].shape):
            raise ConfigError(
                f"{model_dir}: {name} has shape {tuple(there[name].shape)}, config.json says {tuple(shapes[name])}; is "
                "config.json of another model?"
            )
    if family.takes != "tokens":  # transformers would make up the head that a checkpoint of another task lacks
        wanted += shapes
    wanted += expert_tensors(family, model_config)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ConfigError(
            f"{model_dir} has no tensor {missing[0]!r}; give a checkpoint that save_pretrained wrote of the model with "
            f"its head ({checkpoint.stock_class(model_config).__name__}) and of this config.json"
        )


def _check_sizes(model_dir: Path, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """The sizes that are counted with must be in config.json; ``transformers`` would take its defaults."""
    heads = ("num_attention_heads",) if attention.PART in family.parts else ()
    missing = [key for key in ("hidden_size", "num_hidden_layers", *heads) if key not in model_config]
    try:
        family.widths(model_config)
    except KeyError as error:
        missing.append(error.args[0])
    if missing:
        raise checkpoint.damaged(model_dir / "config.json", f"it has no {missing[0]!r}")


def check_sampling(config: RunConfig, positions: int) -> None:
    """There must be as many tokens as are to be sampled; of every sequence or image, the first is never taken."""
    data, record = config.data, config.record
    available = data.calibration_sequences * (positions - 1)
    if record.tokens > available:
        raise ConfigError(
            f"record.tokens={record.tokens} is more than the {available} tokens of {data.calibration_sequences} "
            f"calibration sequences without their first; lower it or raise data.calibration_sequences"
        )


def check_disk(
    config: RunConfig, model_config: Mapping[str, Any], family: MlpFamily, folder: Path, parameters: int
) -> None:
    """What the run writes must fit on the volume of its folder."""
    parts = bytes_of_run(config, model_config, family, parameters)
    elsewhere = RECORDED if config.record.storage is not None else ()
    needed = sum(size for name, size in parts.items() if name not in elsewhere)
    free = files.free_bytes(folder)
    if needed > free:
        raise ConfigError(
            f"the run needs {in_units(needed)} below {folder} and {in_units(free)} are free; lower "
            "record.tokens, raise record.shard_sequences, or set run.root to a larger volume"
        )


def check_not_foreign(folder: Path) -> None:
    """A folder with other files is somebody's: nothing is written there."""
    foreign = sorted(entry.name for entry in folder.glob("[!.]*"))
    if foreign and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds {foreign[0]!r} but no config.json of a run; choose another run.folder")
