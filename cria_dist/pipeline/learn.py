"""The gates a method asks for: learned once per model and recipe, by training workers."""

from dataclasses import replace
from pathlib import Path

from cria_dist import files
from cria_dist.methods import Method
from cria_dist.methods.gates import GateMethod
from cria_dist.pipeline.context import Context
from cria_dist.stages.learn import LearnTask
from cria_dist.stages.recover_log import following
from cria_dist.store.gates import Gates


def learn_gates(
    context: Context, name: str, folder: Path, model_dir: Path, model_digest: str, method: Method
) -> Gates | None:
    """Learn the gates unless they are there; None for a method that has none.

    Args:
        context: the run.
        name: name of the stage.
        folder: folder of the analysis; the gates lie in it.
        model_dir: checkpoint whose units get gates.
        model_digest: digest of its weights.
        method: what they are for.
    """
    if not isinstance(method, GateMethod):
        return None
    job = context.job
    digest = files.digest(
        "learn",
        model_digest,
        *job.training_digests,
        method.model_dump(mode="json"),
        [job.numerics.matmul, job.config.seed],
    )
    gates = Gates(folder / "learn" / "gates.npz", digest)
    if gates.there():
        context.progress.note(f"{name}: complete, {method.steps} steps")
        return gates
    log_path = folder / "learn" / f"loss-{digest[:8]}.jsonl"
    task = LearnTask(model_dir, job.calibration_path, gates, log_path, method, job.numerics.matmul, job.config.seed)
    task = replace(task, labels_path=job.calibration_labels_path)
    context.pool.release()
    tokens_per_step = method.batch_sequences * (method.sequence_length if task.labels_path is None else 1)
    with (
        context.stage(name, method.steps, "steps") as bar,
        following(log_path, bar.advance, tokens_per_step),
    ):
        context.train(task, f"learn-{digest[:12]}", folder / "learn")
    return gates
