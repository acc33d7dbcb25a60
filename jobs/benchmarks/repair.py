"""What a sequential repair costs beside the plain forward pass of the same tokens, in one process, in turn."""

import functools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cria_dist.models.blocks import partition
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.location import locate
from cria_dist.records import Site
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.stages.repair import Repairer, RepairTask
from cria_dist.stages.repair_sequential import SequentialRepairer
from cria_dist.stages.repair_steps import SequentialTask, Solve, steps
from jobs.benchmarks.frame import Measurement, seconds
from jobs.benchmarks.record_setup import Load, make_task, one_thread

BUILTIN = "builtin:smollm2-135m"
LOAD = Load(shards=2, sequences=8, batch=4, length=512, sampled=4)
QUICK_LOAD = Load(shards=2, sequences=2, batch=1, length=128, sampled=4)
RIDGE = 1e-4
REMOVED = 5
"""One in so many neurons of every layer goes: which ones makes no difference to the time."""
PROTOCOL = (
    "Sequential repair of SmolLM2-135M without a fifth of its neurons, random tokens, float32, one compute thread, "
    "loading of layers, sealing of sums and hidden states included. passes_over_forward: the steps in which examples "
    "go through layers over the plain decoder pass of the same tokens in the same batches; solves_over_local: the "
    "steps that solve weights over the local repair, which solves each site once.",
)
Samples = dict[str, list[float]]


def measure(quick: bool) -> Measurement:
    """Seconds of a plain pass, of the local repair and of the two kinds of steps of a sequential one."""
    load, repeats = (QUICK_LOAD, 1) if quick else (LOAD, 3)
    directory = locate(BUILTIN, None)
    found: Samples = {"decoder": [], "local repair": [], "passes": [], "solves": []}
    with tempfile.TemporaryDirectory() as folder, one_thread():
        record = make_task(Path(folder), directory, load, Numerics())
        task = _recorded(record, load.shards, Path(folder))
        decoder = _decoder(record)
        for repeat in range(repeats):
            found["decoder"].append(seconds(decoder))
            found["local repair"].append(seconds(functools.partial(_locally, task, Path(folder) / f"local-{repeat}")))
            passes, solves = _in_sequence(replace(task, folder=Path(folder) / f"sequence-{repeat}"), load.shards)
            found["passes"].append(passes)
            found["solves"].append(solves)
    middle = {name: statistics.median(values) for name, values in found.items()}
    metrics = {
        "passes_over_forward": middle["passes"] / middle["decoder"],
        "solves_over_local": middle["solves"] / middle["local repair"],
    }
    what = f"{load.shards} shards of {load.tokens} tokens"
    return Measurement("repair", PROTOCOL, metrics, {what: found}, {what: "s"})


def _recorded(record: RecordTask, shards: int, folder: Path) -> SequentialTask:
    """Moments of the model, and what is to be repaired."""
    config = read_config(record.model_dir)
    widths = family_of(config).widths(config, ("mlp",))
    layers = int(config["num_hidden_layers"])
    recorder = Recorder(record)
    for shard in range(shards):
        recorder(ShardWork(shard, *partition(layers, 1)))
    record.recording.write_manifest(list(widths), shards)
    kept = {site.key: tuple(unit for unit in range(width) if unit % REMOVED) for site, width in widths.items()}
    return SequentialTask(record, kept, {site.key: width for site, width in widths.items()}, RIDGE, folder, "d1" * 32)


def _decoder(record: RecordTask) -> Callable[[], None]:
    plain = load_model(record.model_dir, record.numerics)
    decoder = getattr(plain, plain.base_model_prefix)
    tokens_ST = torch.from_numpy(np.load(record.tokens_path)).long()

    def run() -> None:
        with torch.inference_mode():
            for batch_ST in tokens_ST.split(record.batch_sequences):
                decoder(input_ids=batch_ST, use_cache=False)

    return run


def _locally(task: SequentialTask, folder: Path) -> None:
    record = task.record
    what = record.recording, record.model_dir, task.kept, "least_squares", task.ridge
    repairer = Repairer(RepairTask(*what, folder, task.digest))
    for key in task.kept:
        repairer(Site.from_key(key))


def _in_sequence(task: SequentialTask, shards: int) -> tuple[float, float]:
    """Seconds of the passes and of the solves."""
    worker, taken = SequentialRepairer(task), {True: 0.0, False: 0.0}
    for step in steps(task, shards):
        taken[isinstance(step, Solve)] += seconds(functools.partial(worker, step))
    return taken[False], taken[True]
