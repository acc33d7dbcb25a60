"""The recovery of a run: carried out once, read back when its result fits, or stopped by a sweep."""

from dataclasses import replace
from pathlib import Path

from cria_dist import files
from cria_dist.models import checkpoint, depth
from cria_dist.pipeline import weights
from cria_dist.pipeline.context import Context
from cria_dist.pipeline.rounds import Model
from cria_dist.stages import recover


def recover_model(context: Context, pruned: Model) -> Model | None:
    """Fine-tune the pruned checkpoint; None when recovery is switched off, or was stopped."""
    job, config = context.job, context.job.config.recover
    if not config.steps:
        return None
    digest = _digest(context, pruned)
    target = job.folder / "recovered"
    mark = job.folder / "recover" / "done.json"
    log_path = loss_path(context, pruned)
    if context.race is not None:
        context.race.follow(recover.read_log(log_path), config.steps)
    if mark.is_file() and files.read_json(mark) == {"digest": digest} and checkpoint.is_complete(target):
        context.progress.note(f"recover: complete, {config.steps} steps")
        return Model(target, digest, pruned.plan)
    if context.stopped:
        return None
    plan = pruned.plan if config.distill_hidden else None
    layers = None if plan is None else depth.surviving(plan.kept, job.model_config)
    teacher = recover.Teacher(job.model_dir, job.numerics.dtype, layers)
    task = recover.RecoverTask(
        pruned.directory, job.calibration_path, target, log_path, config, job.numerics.matmul, job.config.seed, teacher
    )
    held = weights.held_zeros(job.config.method, pruned.directory)
    task = replace(
        task, held=held, labels_path=job.calibration_labels_path, parts=job.config.prune.parts, race=context.race
    )
    context.pool.release()
    tokens_per_step = config.batch_sequences * (config.sequence_length if task.labels_path is None else 1)
    with (
        context.stage("recover", config.steps, "steps") as bar,
        recover.following(log_path, bar.advance, tokens_per_step),
    ):
        context.train(task, f"recover-{digest[:12]}", job.folder / "recover")
    if context.stopped:
        context.progress.note(f"recover: {context.stopped}")
        return None
    if pruned.plan is not None:
        files.write_bytes(target / checkpoint.PLAN, pruned.plan.to_json().encode())
    files.write_json(mark, {"digest": digest})
    return Model(target, digest, pruned.plan)


def loss_path(context: Context, pruned: Model) -> Path:
    """Loss log of the recovery of a pruned model."""
    return context.job.folder / "recover" / f"loss-{_digest(context, pruned)[:8]}.jsonl"


def _digest(context: Context, pruned: Model) -> str:
    job, config = context.job, context.job.config.recover
    return files.digest(
        "recover",
        pruned.digest,
        *job.training_digests,
        config.content_part(),
        [job.numerics.matmul, job.config.seed],
        *job.other_parts,
        *([job.digests["model"], job.numerics.dtype] if config.distills else []),
    )
