"""The gradients a method asks for: taken once per model and sample, shard by shard on the pool."""

import functools
from dataclasses import replace
from pathlib import Path

from cria_dist import files
from cria_dist.methods import Method
from cria_dist.pipeline.context import Context
from cria_dist.stages import gradients
from cria_dist.store.saliences import Saliences


def take_gradients(
    context: Context, name: str, folder: Path, model_dir: Path, model_digest: str, method: Method
) -> Saliences | None:
    """Take the gradients that are not there yet; None for a method that needs none.

    Args:
        context: the run.
        name: name of the stage.
        folder: folder of the analysis; the saliences lie below it.
        model_dir: checkpoint to take gradients of.
        model_digest: digest of its weights.
        method: what they are for.
    """
    if "gradients" not in method.needs:
        return None
    job, shards = context.job, gradients.cut(method.gradient_sample)
    digest = files.digest(
        "gradients",
        model_digest,
        *job.training_digests,
        [[shard.start, shard.stop] for shard in shards],
        [job.numerics.dtype, job.numerics.matmul],
        *job.other_parts,
    )
    saliences = Saliences(folder / "gradients", digest, tuple(shard.stop - shard.start for shard in shards))
    task = gradients.GradientTask(model_dir, job.calibration_path, job.numerics, saliences, job.config.prune.parts)
    task = replace(task, labels_path=job.calibration_labels_path)
    missing = [shard for shard in shards if not saliences.has(shard.number)]
    make = functools.partial(gradients.GradientTaker, task)
    context.map((name, "shards"), make, missing, tokens=lambda tokens: tokens)
    return saliences
