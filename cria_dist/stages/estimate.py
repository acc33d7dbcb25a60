"""What a run will take, from configuration and shapes alone; no weights are read unless a probe is asked for.

Its parts: ``estimate_left`` (what is left of the model), ``estimate_memory`` and ``estimate_recover`` (what a worker
needs), ``estimate_time``; here is what is stored.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cria_dist.config import RunConfig
from cria_dist.models import checkpoint, location
from cria_dist.models.family import family_of
from cria_dist.models.mlp import MlpFamily
from cria_dist.records import Site
from cria_dist.stages import estimate_memory
from cria_dist.stages.analyse import analyst_bytes, widest_site
from cria_dist.stages.check_model import check_model
from cria_dist.stages.check_tensors import check_sizes, check_tensors
from cria_dist.stages.estimate_left import left_of
from cria_dist.stages.estimate_time import times, workers_assumed
from cria_dist.stages.footprint import Workload, in_units, itemsize, num_shards, signal_dtype
from cria_dist.store.moments import stored_bytes

RECORDED = ("signals", "moments", "boundaries")
"""What lies in ``record.storage`` where there is one."""
UNLABELLED = {"ends_with": "apply: recover and evaluate (hence prune) need data.calibration.label and data.test.label"}
"""Said of a classifier's run that has no labels."""


def bytes_of_run(
    config: RunConfig, model_config: Mapping[str, Any], family: MlpFamily, parameters: int
) -> dict[str, int]:
    """Bytes the run writes: inputs, recording, hidden states between blocks, repair, checkpoints, recovery.

    What the repair leaves, and the checkpoints, as if no unit left.
    """
    units = family.widths(model_config, config.prune.parts)
    widths = [width * family.span(site, model_config) for site, width in units.items()]
    sequences, length = config.data.calibration_sequences, config.data.sequence_length
    tokens = sequences * family.positions(model_config, length)
    recovers = config.recover.steps > 0 and (family.takes == "tokens" or config.data.labelled)
    hidden_states = tokens * int(model_config["hidden_size"]) * itemsize(config.model.dtype)
    stored = itemsize(str(model_config.get("dtype") or model_config.get("torch_dtype") or "float32"))
    model_bytes, rounds = parameters * stored, config.prune.rounds
    layers, hidden_size = int(model_config["num_hidden_layers"]), int(model_config["hidden_size"])
    around_layers = (layers + 1) * hidden_size * config.records_hidden
    numbers = sum(widths) * family.signals() + around_layers
    masked = sum(method.unit == "weight" for method in (config.method, *config.compare))
    # of a sequential repair on its way: both models' hidden states around a layer, sums of products at a site
    passing = 4 * hidden_states + 4 * num_shards(config) * max(
        (width * (width + hidden_size) for width in widths), default=0
    )
    # masked maps and sparse copies, at most as large as the model
    sparse = masked + (rounds + recovers) * (config.method.unit == "weight")
    return {
        "inputs": 4 * sequences * math.prod(family.input_shape(model_config, length)),
        "signals": rounds * config.record.tokens * numbers * itemsize(signal_dtype(config)),
        "moments": rounds * num_shards(config) * sum(map(stored_bytes, widths)),
        "boundaries": 0 if config.record.schedule == "replicate" else hidden_states,
        "repair": stored * _solved_weights(config, family, model_config, units)
        + passing * (config.prune.repair == "sequential"),
        "checkpoints": model_bytes * (rounds + recovers + sparse),
        "recovery_state": 2 * 12 * parameters * recovers,
    }


def _solved_weights(
    config: RunConfig, family: MlpFamily, model_config: Mapping[str, Any], sites: Iterable[Site]
) -> int:
    """Weights that repairs solve and keep: in every round, and for every compared method; biases alone hardly count."""
    compared = sum(method.unit == "mlp" for method in config.compare)
    times = config.prune.rounds * (config.method.unit == "mlp") + compared
    if config.prune.repair not in ("least_squares", "sequential") or not times:
        return 0
    sizes: dict[str, int] = {}
    for name, parameter in checkpoint.empty_model(model_config).named_parameters():
        names = [one for piece in family.pieces(name, parameter.shape) for one in piece] or [family.on_disk(name)]
        sizes |= dict.fromkeys(names, parameter.numel() // len(names))
    return times * sum(sizes[name] for site in sites for name in family.solved(site, model_config))


def estimate(config: RunConfig, measured: bool = False) -> dict[str, object]:
    """Parameters, storage, memory, schedule, work and time of a run, as plain data for display.

    Args:
        config: the run.
        measured: take the time from recording a part of the model in this process; else from matrix products.

    Raises:
        ConfigError: the model cannot be found or its family is not known, what is there of it is damaged, or what is
            asked for cannot be done with it.
        PlanError: the ratio would empty a layer.
    """
    directory = location.locate(config.model.path, config.model.revision, weights=measured)
    model_config = checkpoint.read_config(directory)
    family = family_of(model_config)
    check = check_tensors if checkpoint.is_complete(directory) else check_sizes
    check(directory, family, model_config)
    work = Workload(config, model_config)
    unlabelled = family.takes != "tokens" and not config.data.labelled
    check_model(config, family, model_config, work.sizes.parameters, "apply" if unlabelled else "evaluate")
    left = left_of(config, family, model_config, work.sizes.parameters)
    recovers, workers = config.recover.steps > 0 and not unlabelled, workers_assumed(config)
    storage = bytes_of_run(config, model_config, family, work.sizes.parameters)
    widths, signals = family.widths(model_config, work.parts), widest_site(family, model_config, work.parts)
    prunable = sum(width * family.unit_cost(site, model_config) for site, width in widths.items())
    return {
        "parameters": work.sizes.parameters,
        "prunable_parameters": prunable - family.removed_twice(model_config, {site.key: () for site in widths}),
        "sites": len(widths),
        "units_per_site": max(widths.values(), default=0),
        **left.found,
        "calibration_tokens": config.data.calibration_sequences * work.length,
        "shards": num_shards(config),
        **{f"storage_bytes.{name}": size for name, size in storage.items()},
        "storage_bytes.total": sum(storage.values()),
        **_advice(config, storage),
        **estimate_memory.to_record(config, work, workers),
        **estimate_memory.to_evaluate(config, work.sizes.parameters, prunable, workers),
        **estimate_memory.to_repair(config, family, model_config),
        **(estimate_memory.to_recover(config, model_config, left) if recovers else {}),
        "analyst_memory_bytes": max(
            analyst_bytes(method.needs, config.record.tokens, signals, work.sizes.hidden)
            for method in (config.method, *config.compare)
        ),
        **times(config, work, workers, directory if measured else None),
        **(UNLABELLED if unlabelled else {}),
    }


def _advice(config: RunConfig, storage: Mapping[str, int]) -> dict[str, object]:
    """Moments are most of what is stored: say which shards would halve the total, as far as shards can be merged."""
    others = sum(storage.values()) - storage["moments"]
    per_shard = storage["moments"] // num_shards(config)
    if storage["moments"] <= others or num_shards(config) == 1:
        return {}
    sequences = math.ceil(config.data.calibration_sequences / max(1, others // per_shard))
    shards = math.ceil(config.data.calibration_sequences / sequences)
    return {
        "storage_bytes.advice": f"moments are most of it; record.shard_sequences={sequences} makes {shards} shards "
        f"and {in_units(shards * per_shard)} of moments"
    }
