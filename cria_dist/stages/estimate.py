"""What a run will take, from configuration and shapes alone; no weights are read."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.models.family import GatedMlpFamily, family_of


def signal_dtype(config: RunConfig) -> str:
    """Data type recorded signals are stored in."""
    return config.model.dtype if config.record.dtype == "auto" else config.record.dtype


def num_shards(config: RunConfig) -> int:
    """Shards of the calibration set."""
    return math.ceil(config.data.calibration_sequences / config.record.shard_sequences)


def bytes_of_run(
    config: RunConfig, model_config: Mapping[str, Any], family: GatedMlpFamily, parameters: int
) -> dict[str, int]:
    """Bytes the run writes: signals, moments, checkpoints, checkpoints of the recovery."""
    widths = family.widths(model_config)
    units = sum(widths.values())
    signals = len(family.modules(next(iter(widths))).inputs) + 1
    squares = sum(width * width for width in widths.values())
    model_bytes = parameters * _itemsize(str(model_config.get("dtype") or model_config.get("torch_dtype") or "float32"))
    rounds = config.prune.rounds
    return {
        "signals": rounds * config.record.tokens * units * signals * _itemsize(signal_dtype(config)),
        "moments": rounds * num_shards(config) * squares * 4,
        "checkpoints": model_bytes * (rounds + (1 if config.recover.steps else 0)),
        "recovery_state": 2 * 12 * parameters if config.recover.steps else 0,
    }


def estimate(config: RunConfig) -> dict[str, object]:
    """Parameters, storage and memory of a run, as plain data for display.

    Raises:
        ConfigError: the model cannot be found or its family is not known.
    """
    directory = checkpoint.locate(config.model.path, config.model.revision)
    model_config = checkpoint.read_config(directory)
    family = family_of(model_config)
    parameters = checkpoint.count_parameters(model_config)
    widths = family.widths(model_config)
    storage = bytes_of_run(config, model_config, family, parameters)
    widest = max(widths.values())
    moments_memory = sum(width * width for width in widths.values()) * 4
    tokens = config.data.calibration_sequences * config.data.sequence_length
    return {
        "parameters": parameters,
        "prunable_parameters": sum(widths.values()) * family.unit_cost(model_config),
        "sites": len(widths),
        "units_per_site": widest,
        "calibration_tokens": tokens,
        "shards": num_shards(config),
        "recorder_memory_bytes": parameters * _itemsize(config.model.dtype) + moments_memory,
        "analyst_memory_bytes": 4 * config.record.tokens * widest * 6 + 8 * 4 * widest * widest,
        "forward_flop": 2 * parameters * tokens * config.prune.rounds,
        "moments_flop": 2 * sum(width * width for width in widths.values()) * tokens * config.prune.rounds,
        **{f"storage_bytes.{name}": size for name, size in storage.items()},
        "storage_bytes.total": sum(storage.values()),
    }


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype.removeprefix("torch.")).itemsize
