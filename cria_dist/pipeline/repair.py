"""The repair of a round: every site by itself from the recording, or one after the other from what is left of it."""

import functools
from pathlib import Path

from cria_dist import files
from cria_dist.models import checkpoint
from cria_dist.models.depth import within_layers
from cria_dist.pipeline.context import Context
from cria_dist.pipeline.recording import record_task
from cria_dist.pipeline.rounds import Model, at_a_time
from cria_dist.pool import Flow
from cria_dist.records import PruningPlan
from cria_dist.stages import boundary, decide, repair
from cria_dist.stages.footprint import num_shards
from cria_dist.stages.repair_sequential import SequentialRepairer
from cria_dist.stages.repair_steps import Advance, SequentialTask, Solve, steps
from cria_dist.store.recording import Recording


def repair_sites(
    context: Context, name: str, folder: Path, recording: Recording, model: Model, plan: PruningPlan
) -> Path | None:
    """Re-solve the output weights of every site; returns the folder of replacement tensors, None without repair."""
    prune = context.job.config.prune
    if prune.repair == "none":
        return None
    if not within_layers(plan.kept):
        context.progress.note(f"{name}: whole layers leave, there are no output weights to repair")
        return None
    kept = decide.local_indices(plan, model.plan)
    digest = files.digest("repair", plan.to_json(), recording.digest, prune.repair, prune.ridge)
    if prune.repair == "sequential":
        sites = context.job.family.widths(checkpoint.read_config(model.directory), prune.parts)
        widths = {site.key: units for site, units in sites.items()}
        task = record_task(context, recording, model.directory)
        _in_sequence(context, name, SequentialTask(task, kept, widths, prune.ridge, folder / "repair", digest))
    else:
        what = recording, model.directory, kept, prune.repair, prune.ridge
        _each_by_itself(context, name, repair.RepairTask(*what, folder / "repair", digest))
    return folder / "repair"


def _each_by_itself(context: Context, name: str, task: repair.RepairTask) -> None:
    sites = [site for site in sorted(context.job.widths) if task.kept[site.key]]
    missing = [site for site in sites if not repair.is_repaired(task.folder, site, task.digest)]
    # they compute on the host, whose memory is not known where workers measure their GPU's
    workers = None if context.pool.on_gpus or not missing else at_a_time(context, {"moments", "weights"})[1]
    context.map((name, "sites"), functools.partial(repair.Repairer, task), missing, workers=workers)


def _in_sequence(context: Context, name: str, task: SequentialTask) -> None:
    task.clear_others()
    left = steps(task, num_shards(context.job.config))
    if not left:
        task.clear()  # if an interrupted run did not come to it
        context.progress.note(f"{name}: complete, {len(task.sites)} sites")
        return
    make = functools.partial(SequentialRepairer, task)
    with context.stage(name, len(left), "steps") as bar:
        for step, tokens in context.pool.map(make, list(left), flow=Flow(left)):
            bar.advance(1, tokens=tokens)
            # not by the worker: if it dies before its answer, the retry reads them again
            if isinstance(step, Advance) and step.layer:
                for stream in task.streams:
                    boundary.delete(stream, step.layer, step.shard)
            elif isinstance(step, Solve):
                task.forget(step.site)
    task.clear()
