"""One round: record, analyse, decide, repair, apply. Every step skips itself when its artefact is there and fits."""

import functools
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.maths.allocation import width_after_round
from cria_dist.methods import Method
from cria_dist.methods.base import Statistic
from cria_dist.methods.layers import LayerMethod
from cria_dist.methods.weights import WeightMethod
from cria_dist.models import checkpoint, residual, surgery
from cria_dist.models.depth import PART
from cria_dist.pipeline import allocation, depth, weights
from cria_dist.pipeline.context import Context
from cria_dist.pipeline.gradients import take_gradients
from cria_dist.pipeline.learn import learn_gates
from cria_dist.pipeline.recording import record_model
from cria_dist.pool import Flow
from cria_dist.records import PruningPlan, Site
from cria_dist.stages import analyse, decide, memory
from cria_dist.stages.budget import multiple_of, sites_of
from cria_dist.stages.decide import Accounts
from cria_dist.store import site_scores
from cria_dist.store.recording import Recording


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint on the way from dense to pruned.

    Attributes:
        directory: the checkpoint.
        digest: digest of its weights, or of what they were computed from.
        plan: how it came out of the dense model; None for the dense model.
    """

    directory: Path
    digest: str
    plan: PruningPlan | None = None


def dense_model(context: Context) -> Model:
    """The model the run starts from."""
    return Model(context.job.model_dir, context.job.digests["model"])


def round_folder(context: Context, index: int) -> Path:
    """Folder of a round."""
    return context.job.folder / f"round-{index:02d}"


def record_round(context: Context, index: int, model: Model) -> Recording:
    """Observe the model on the calibration text, or take over what was observed before."""
    name = f"record round {index + 1}" if context.job.config.prune.rounds > 1 else "record"
    return record_model(context, name, round_folder(context, index), model.directory, model.digest)


def analyse_sites(context: Context, name: str, folder: Path, recording: Recording, model: Model, method: Method) -> str:
    """Score every site with a method; returns the digest of the analysis."""
    if isinstance(method, LayerMethod):
        return depth.analyse_layers(context, name, folder, recording, model, method)
    if isinstance(method, WeightMethod):
        return weights.sparsify_sites(context, name, folder, model, method)
    job = context.job
    labels = job.label_digests if method.needs & {"gradients", "gates"} else []
    digest = files.digest("analyse", recording.digest, model.digest, method.model_dump(mode="json"), *labels)
    sites = sorted(job.widths)
    missing = [site for site in sites if not site_scores.has_scores(folder, site, digest)]
    if missing and site_scores.adopt(folder, job.folder.parent, missing, digest):
        context.progress.note(f"{name}: scores taken over from a neighbouring run (same recording and method)")
        missing = []
    if not missing:
        context.progress.note(f"{name}: complete, {len(sites)} sites")
        return digest
    saliences = take_gradients(context, f"{name}: gradients", folder, model.directory, model.digest, method)
    gates = learn_gates(context, f"{name}: learn", folder, model.directory, model.digest, method)
    sharing, workers = at_a_time(context, method.needs)
    task = analyse.AnalyseTask(
        recording, model.directory, method, folder, digest, job.config.seed, sharing, saliences, gates
    )
    make = functools.partial(analyse.Analyst, task)
    context.map((name, "sites"), make, missing, workers=workers, flow=Flow(sharing=sharing))
    return digest


def at_a_time(context: Context, needs: Collection[Statistic]) -> tuple[int, int | None]:
    """How many workers that read these statistics share a GPU, and without GPUs how many there may be, by memory."""
    job, pool = context.job, context.pool
    if pool.workers == 1 and not pool.on_gpus:
        return 1, None
    width = analyse.widest_site(job.family, job.model_config, job.config.prune.parts)
    size = analyse.analyst_bytes(needs, job.config.record.tokens, width, int(job.model_config["hidden_size"]))
    available = memory.of_worker(job.config, pool)
    if pool.on_gpus:
        return analyse.analysts_per_device(size, available), None
    return 1, analyse.analysts_at_a_time(size, available, pool.workers)


def decide_round(
    context: Context, folder: Path, model: Model, method: Method, analysis: str, index: int
) -> PruningPlan:
    """Choose what stays, within this round's part of the budget; writes ``plan.json``."""
    if isinstance(method, LayerMethod):
        return depth.decide_layers(context, folder, model, method, analysis, index)
    if isinstance(method, WeightMethod):
        return weights.decide_weights_round(context, folder, method, analysis)
    job, prune = context.job, context.job.config.prune
    path = folder / "plan.json"
    settings = prune.model_dump(include={"ratio", "budget", "multiple", "rounds", "repair"})
    followed = _followed(context, folder, index)
    spread_by = [*allocation.settings(context), *([followed.digest] if followed else [])]
    digest = files.digest("decide", analysis, settings, index, *spread_by)
    plan = _plan_there(path)
    if plan is not None and plan.digest == digest:
        return plan
    if followed is not None:
        widths = {key: len(kept) for key, kept in followed.kept.items()}
    elif prune.allocation == "uniform":
        widths = _even_widths(context, index)
    else:
        widths = allocation.spread_widths(context, folder, model, analysis, index)
    survivors = _survivors(folder, widths)
    plan = decide.make_plan(
        decide.compose(survivors, model.plan),
        {site.key: width for site, width in sites_of(job.config, job.family, job.model_config).items()},
        Accounts(job.dense_parameters, job.unit_parameters, job.added_parameters(survivors)),
        method.title,
        digest,
    )
    files.write_bytes(path, plan.to_json().encode())
    return plan


def _survivors(folder: Path, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The units that stay at each site; a whole layer is its own one unit, and nothing stays inside one that goes."""
    sites = {key: Site.from_key(key) for key in widths}
    if all(site.part in residual.PARTS for site in sites.values()):
        scores = [site_scores.read_scores(folder, site) for site in sites.values()]
        return dict.fromkeys(widths, decide.select_together(scores, min(widths.values())))
    return {
        key: tuple(range(widths[key]))
        if site.part == PART or not widths[key]
        else decide.select(site_scores.read_scores(folder, site), widths[key])
        for key, site in sites.items()
    }


def _even_widths(context: Context, index: int) -> dict[str, int]:
    """Units per site after a round, the same share of each."""
    job, prune, final = context.job, context.job.config.prune, context.job.final_widths
    return {
        site.key: width_after_round(width, final[site.key], prune.rounds, index, multiple_of(prune, site))
        for site, width in sorted(job.widths.items())
    }


def _followed(context: Context, folder: Path, index: int) -> PruningPlan | None:
    """The plan of the run's own method, whose widths compared methods take where they could have others."""
    own = round_folder(context, index)
    spread = context.job.config.prune.allocation != "uniform"
    return _plan_there(own / "plan.json") if spread and folder != own else None


def _plan_there(path: Path) -> PruningPlan | None:
    """The plan on storage; None when there is none or it is damaged, for deciding again costs nothing."""
    try:
        return PruningPlan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def apply_plan(
    context: Context, target: Path, recording: Recording, model: Model, plan: PruningPlan, repaired: Path | None
) -> Model:
    """Write the pruned checkpoint, with ``plan.json`` beside the weights."""
    prune = context.job.config.prune
    digest = files.digest("apply", plan.to_json(), recording.digest, prune.repair, prune.ridge)
    mark = target / "plan.json"
    wanted = replace(plan, digest=digest).to_json()
    if target.is_dir() and not (mark.is_file() and mark.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(target)
    if not checkpoint.is_complete(target):
        files.write_bytes(mark, wanted.encode())
        config = checkpoint.read_config(model.directory)
        kept, biased = decide.local_indices(plan, model.plan), repaired is not None and context.job.repair == "bias"
        operation = surgery.Surgery(context.job.family, config, kept, repaired, biased)
        with context.stage("apply", len(checkpoint.weight_files(model.directory)), "files") as bar:
            surgery.write_pruned(model.directory, target, operation)
            bar.advance(len(checkpoint.weight_files(model.directory)))
    return Model(target, digest, plan)
