"""Single weights in a run: set them to zero site by site, account for them, hand them to what applies a plan."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from cria_dist import files
from cria_dist.methods import Method
from cria_dist.methods.weights import WeightMethod
from cria_dist.pipeline.context import Context
from cria_dist.records import PruningPlan
from cria_dist.report import text
from cria_dist.stages import compress, decide_weights, sparsify
from cria_dist.store import site_scores

if TYPE_CHECKING:
    from cria_dist.pipeline.rounds import Model


def sparsify_sites(context: Context, name: str, folder: Path, model: "Model", method: WeightMethod) -> str:
    """Set the zeros of every site; returns the digest of what they depend on."""
    job = context.job
    share = decide_weights.zero_share(job.config, job.family, job.model_config, job.dense_parameters)
    digest = files.digest("sparsify", model.digest, method.model_dump(mode="json"), share, job.config.seed)
    task = sparsify.SparsifyTask(model.directory, method, share, folder, digest, job.config.seed)
    missing = [site for site in sorted(job.widths) if not sparsify.is_sparsified(task, site)]
    if not missing:
        context.progress.note(f"{name}: complete, {len(job.widths)} sites")
    context.map((name, "sites"), functools.partial(sparsify.Sparsifier, task), missing)
    return digest


def decide_weights_round(context: Context, folder: Path, method: WeightMethod, analysis: str) -> PruningPlan:
    """Count the zeros; writes ``plan.json``, in which every unit stays."""
    job = context.job
    if job.config.prune.repair != "none":
        context.progress.note(f"{method.title}: no unit leaves, there are no output weights to repair")
    zeros = sum(int(site_scores.read_scores(folder, site).facts["zeros"]) for site in job.widths)
    digest = files.digest("decide", analysis)
    plan = decide_weights.weights_plan(job.widths, zeros, job.dense_parameters, method.title, digest)
    files.write_bytes(folder / "plan.json", plan.to_json().encode())
    return plan


def masks_of(method: Method, folder: Path) -> Path | None:
    """The maps with their zeros, which replace those of the dense model; None for methods that remove units."""
    return folder / sparsify.MASKS if isinstance(method, WeightMethod) else None


def held_zeros(method: Method, pruned: Path) -> tuple[str, ...]:
    """Tensors of the pruned checkpoint whose zeros a recovery must leave alone."""
    return tuple(sorted(sparsify.sparse_names(pruned))) if isinstance(method, WeightMethod) else ()


def protocol(context: Context) -> tuple[str, ...]:
    """What must be known of a report in which single weights become zero."""
    config = context.job.config
    if not any(isinstance(method, WeightMethod) for method in (config.method, *config.compare)):
        return ()
    share = "weights of each MLP map" if config.prune.budget == "units" else config.prune.budget
    return (
        f"Single weights: the ratio is the share of the {share} that becomes zero, attention and embeddings are left "
        "alone; zeros stay in the tensors, hence in the parameters, bytes and time of a variant, and get no repair.",
    )


def compress_checkpoint(context: Context, model: "Model | None") -> dict[str, str]:
    """Write the compressed copy of a checkpoint below ``compressed/``; returns what the report says of it."""
    job = context.job
    if model is None or not isinstance(job.config.method, WeightMethod):
        return {}
    copy = compress.Copy(model.directory, job.folder / "compressed" / model.directory.name, model.digest)
    missing = [] if copy.is_there() else [copy]
    context.map(("compress", "checkpoints"), compress.Compressor, missing, workers=1)
    sizes = files.read_json(copy.record)
    share = text.percent(sizes["bytes"] / sizes["dense_bytes"])
    return {
        f"sparse copy, {model.directory.name}": f"{text.megabytes(sizes['bytes'])} MB, {share} of the checkpoint; "
        "cria_dist.models.sparse.read_sparse expands it to the same tensors, bit for bit"
    }
