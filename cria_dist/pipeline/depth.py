"""Whole layers in a round: measure them shard by shard, judge them together, decide how many go and which."""

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cria_dist import files
from cria_dist.methods import Method
from cria_dist.methods.layers import LayerMethod
from cria_dist.models import checkpoint
from cria_dist.models.depth import layer_sites
from cria_dist.models.sizes import sizes_of
from cria_dist.pipeline import trials
from cria_dist.pipeline.context import Context
from cria_dist.records import Float64, PruningPlan
from cria_dist.stages import decide_depth, measure_layers
from cria_dist.stages.check_layers import measured_sequences
from cria_dist.stages.footprint import num_shards
from cria_dist.store import layer_sums, site_scores
from cria_dist.store.recording import Recording

if TYPE_CHECKING:
    from cria_dist.pipeline.rounds import Model


def analyse_layers(
    context: Context, name: str, folder: Path, recording: Recording, model: "Model", method: LayerMethod
) -> str:
    """Measure all layers of a model and score them; returns the digest of the analysis."""
    job = context.job
    digest = files.digest("analyse", recording.digest, model.digest, method.model_dump(mode="json"))
    sites = layer_sites(checkpoint.read_config(model.directory))
    measured = layer_sums.read_sums(folder, layer_sums.WHOLE, digest) is not None
    if measured and all(site_scores.has_scores(folder, site, digest) for site in sites):
        context.progress.note(f"{name}: complete, {len(sites)} layers")
        return digest
    sequences = measured_sequences(method, job.config.data.calibration_sequences)
    task = measure_layers.MeasureTask(recording, model.directory, method, folder, digest, sequences)
    names = [layer_sums.shard_name(shard) for shard in range(num_shards(job.config))]
    missing = [shard for shard, one in enumerate(names) if layer_sums.read_sums(folder, one, digest) is None]
    context.map((name, "shards"), functools.partial(measure_layers.LayerMeter, task), missing, tokens=int)
    total = measure_layers.added_up([layer_sums.need_sums(folder, one, digest) for one in names])
    measure_layers.write_layer_scores(task, total, _layer_parameters(context, model))
    layer_sums.write_sums(folder, layer_sums.WHOLE, total, digest)
    return digest


def decide_layers(
    context: Context, folder: Path, model: "Model", method: LayerMethod, analysis: str, index: int
) -> PruningPlan:
    """Choose the layers that go, within this round's part of the budget; writes ``plan.json``.

    A method with a tolerance may stop short of the budget: what it would remove is tried on held-out sequences first.
    """
    job, prune = context.job, context.job.config.prune
    parameters = sizes_of(job.model_config, job.family).layers
    sizes, wanted = decide_depth.layer_budget(job.config, job.family, job.model_config, job.dense_parameters)
    there = decide_depth.layers_of(model.plan, len(parameters))
    gone, here = len(sizes) - len(there), [sizes[layer] for layer in there]
    left = wanted - (sum(sizes) - sum(here))
    total = layer_sums.need_sums(folder, layer_sums.WHOLE, analysis)
    digest = files.digest("decide", analysis, prune.model_dump(include={"ratio", "budget", "rounds"}), index)

    def without(removed: Collection[int]) -> PruningPlan:
        kept = [layer for place, layer in enumerate(there) if place not in removed]
        return decide_depth.depth_plan(kept, parameters, job.dense_parameters, method.title, digest)

    if method.tolerance is None:
        count = gone + len(decide_depth.fewest_layers(functools.partial(method.removed, total), here, left))
        now = decide_depth.removed_after_round(count, prune.rounds, index) - gone
        plan = without(method.removed(total, max(0, now)))
    else:
        begin = trials.accepted_before(folder.with_name(f"round-{index - 1:02d}")) if index else 0
        attempts = list(enumerate(_attempts(method, total, here, left)))[begin:]
        plans = {number: without(removed) for number, removed in attempts if removed}
        sequences = job.config.data.calibration_sequences
        trial = trials.Trial(folder, method.tolerance, sequences - measured_sequences(method, sequences))
        accepted = trials.first_accepted(context, trial, plans)
        plan = without(()) if accepted is None else plans[accepted]
    files.write_bytes(folder / "plan.json", plan.to_json().encode())
    return plan


def _attempts(method: LayerMethod, total: Float64, sizes: Sequence[int], left: float) -> list[tuple[int, ...]]:
    """The removals that a method would try, each cut where it makes up what is left of the budget."""

    def attempt(number: int, most: int) -> tuple[int, ...]:
        return method.attempts(total, most)[number]

    numbers = range(len(method.attempts(total, 0)))
    return [decide_depth.fewest_layers(functools.partial(attempt, number), sizes, left) for number in numbers]


def is_settled(method: Method, plan: PruningPlan, model: "Model") -> bool:
    """Whether a method that stops by itself found nothing more to remove in this round."""
    stops = isinstance(method, LayerMethod) and method.tolerance is not None
    return stops and decide_depth.layers_of(plan, len(plan.kept)) == decide_depth.layers_of(model.plan, len(plan.kept))


def _layer_parameters(context: Context, model: "Model") -> tuple[int, ...]:
    config = checkpoint.read_config(model.directory)
    return sizes_of(config, context.job.family).layers
