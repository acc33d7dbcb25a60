"""The record step of a round: take over, resume or observe, under a schedule that fits the machine."""

import functools
from collections.abc import Collection
from pathlib import Path

from cria_dist.models import checkpoint, depth
from cria_dist.pipeline.context import Context
from cria_dist.records import Site
from cria_dist.stages import boundary, record, schedule
from cria_dist.stages.footprint import num_shards, shard_sequences, signal_dtype
from cria_dist.store.places import adopt, open_recording
from cria_dist.store.recording import Recording


def record_model(context: Context, name: str, folder: Path, model_dir: Path, model_digest: str) -> Recording:
    """Observe a model on the calibration text, or take over what was observed before.

    Args:
        context: the run.
        name: name of the stage.
        folder: round folder; the recording lies there unless ``record.storage`` names an object store.
        model_dir: checkpoint to observe.
        model_digest: digest of its weights.
    """
    job, config = context.job, context.job.config
    shards = num_shards(config)
    recording = open_recording(folder, config.record.storage, job.recording_digest(model_digest))
    if recording.is_complete():
        boundary.delete_all(recording)  # it was finished by another run, or this one ended just before
        context.progress.note(f"{name}: complete, {shards} shards")
        return recording
    source = adopt(recording, job.folder.parent)
    if source is not None:
        context.progress.note(f"{name}: taken over from {source.relative_to(job.folder.parent)} (same model and text)")
        return recording
    observed = checkpoint.read_config(model_dir)
    layers = depth.layer_sites(observed) if config.records_hidden else ()
    sites = [*job.family.widths(observed, config.prune.parts), *layers]
    _observe(context, name, recording, model_dir, sites)
    recording.write_manifest(sites, shards)
    boundary.delete_all(recording)
    return recording


def _observe(context: Context, name: str, recording: Recording, model_dir: Path, sites: Collection[Site]) -> None:
    config = context.job.config
    task = record_task(context, recording, model_dir)
    chosen = schedule.choose(config, checkpoint.read_config(model_dir), context.pool)
    context.progress.note(f"{name}: {chosen.kind}, {chosen.reason}")
    shards = num_shards(config)
    items = schedule.pending(chosen, shards, recording.committed(), boundary.stored(recording), sites)
    total = shards * len(chosen.blocks)
    if 0 < len(items) < total:
        context.progress.note(f"{name}: {total - len(items)} of {total} shards were recorded before")
    make = functools.partial(record.Recorder, task, chosen.ranks)
    if not items:
        return
    flow = schedule.flow(chosen, items)
    with context.stage(name, len(items), "shards") as bar:
        for item, done in context.pool.map(make, items, flow=flow):
            bar.advance(1, tokens=done.tokens)
            if not item.block.is_first:  # not by the worker: if it dies before its answer, the retry reads them again
                boundary.delete(recording, item.block.first, item.shard)


def record_task(context: Context, recording: Recording, model_dir: Path) -> record.RecordTask:
    """A model, the calibration examples, and how they go through it."""
    job, config = context.job, context.job.config
    return record.RecordTask(
        recording=recording,
        model_dir=model_dir,
        tokens_path=job.calibration_path,
        numerics=job.numerics,
        signal_dtype=signal_dtype(config),
        shard_sequences=shard_sequences(config),
        batch_sequences=config.record.batch_sequences,
        sampled_tokens=config.record.tokens,
        seed=config.seed,
        hidden=config.records_hidden,
        parts=config.prune.parts,
    )
