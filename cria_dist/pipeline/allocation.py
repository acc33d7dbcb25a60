"""The global decision: the budget of a round spread over its sites, and never worse than spread evenly."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cria_dist import files
from cria_dist.errors import PlanError
from cria_dist.maths.allocation_curves import Curve, measured_widths, sensitivity_widths
from cria_dist.maths.allocation_mixed import alike_widths, mixed_widths
from cria_dist.maths.allocation_rooms import Room, check_floors, even_widths
from cria_dist.maths.allocation_scores import global_widths
from cria_dist.models import depth, experts
from cria_dist.pipeline import latency
from cria_dist.pipeline.context import Context
from cria_dist.records import Site
from cria_dist.stages.budget import CURVE_TOKENS, HELD_OUT, budget_of, held_out, inside_layers, rooms_of, sites_of
from cria_dist.stages.losses import LossTask, Probe, Trial, adopt, read_losses, trial
from cria_dist.stages.sensitivity import CurveMeter, PlanMeter
from cria_dist.store import places, site_scores

if TYPE_CHECKING:
    from cria_dist.pipeline.rounds import Model

FACTS = "allocation.json"
"""Beside ``plan.json``: what was compared on which text, and what was kept."""


@dataclass(frozen=True, slots=True)
class Spread:
    """What the widths of a round are chosen from.

    Attributes:
        rooms: the widths each site may get.
        left: what may stay of the budget.
        task: how losses are measured.
    """

    rooms: Mapping[str, Room]
    left: float
    task: LossTask


def settings(context: Context) -> list[object]:
    """What a decision depends on beside scores and budget: nothing where the budget is spread evenly."""
    job, prune = context.job, context.job.config.prune
    if prune.allocation == "uniform":
        return []
    numerics = [job.numerics.dtype, job.numerics.matmul, job.config.evaluate.batch_sequences, HELD_OUT]
    return [
        prune.model_dump(mode="json", include={"allocation", "floor", "protect", "ridge"}),
        numerics,
        *latency.settings(context),
    ]


def spread_widths(context: Context, folder: Path, model: "Model", analysis: str, index: int) -> dict[str, int]:
    """Widths of a round's sites by ``prune.allocation``, or even ones if these do no worse; writes the facts.

    Args:
        context: the run.
        folder: round folder, with scores and recording.
        model: the model that is pruned.
        analysis: digest of the scores.
        index: number of the round.
    """
    chosen_by = context.job.config.prune.allocation
    spread = _spread(context, folder, model, analysis, index)
    if chosen_by == "global":
        keep = {key: site_scores.read_scores(folder, Site.from_key(key)).keep_N for key in spread.rooms}
        widths = global_widths(keep, spread.rooms, spread.left, context.job.config.method.comparable)
    else:
        widths = _least_loss(_curves(context, spread), spread)
    candidates = {**_evenly(spread), chosen_by: widths}
    losses = _losses(context, spread.task, [trial(name, widths) for name, widths in candidates.items()])
    return candidates[_tell(context, spread, candidates, losses)]


def _evenly(spread: Spread) -> dict[str, dict[str, int]]:
    """What the choice is compared with; none where whole layers may go and the units inside them do not suffice."""
    try:
        return {"uniform": even_widths(spread.rooms, spread.left)}
    except PlanError:
        if not inside_layers(spread.rooms):
            raise
        return {}


def _least_loss(curves: Mapping[str, Curve], spread: Spread) -> dict[str, int]:
    """The best widths by the measured curves; whole layers are weighed against the units inside them.

    Experts are as many in every layer that stays.
    """
    inside = inside_layers(spread.rooms)
    alike = [key for key in spread.rooms if Site.from_key(key).part == experts.PART]

    def solve(rooms: Mapping[str, Room]) -> dict[str, int]:
        if not inside:
            return sensitivity_widths(curves, rooms, spread.left)
        return mixed_widths(curves, rooms, spread.left, inside, spent=bool(alike))

    return alike_widths(solve, curves, spread.rooms, alike, inside) if alike else solve(spread.rooms)


def _spread(context: Context, folder: Path, model: "Model", analysis: str, index: int) -> Spread:
    job, prune = context.job, context.job.config.prune
    sites = sites_of(job.config, job.family, job.model_config)
    dense = {site.key: width for site, width in sites.items()}
    present = dense if model.plan is None else {key: len(model.plan.kept[key]) for key in dense}
    if prune.budget == "latency":
        budget = latency.budget(context)
    else:
        budget = budget_of(job.config, job.family, job.model_config, job.dense_parameters)
    seen, sequences = held_out(job.config)
    batch = job.config.evaluate.batch_sequences
    numerics = [job.numerics.dtype, job.numerics.matmul, batch]
    task = LossTask(
        model_dir=model.directory,
        numerics=job.numerics,
        tokens_path=job.calibration_path,
        sequences=sequences,
        batch_sequences=batch,
        recording=places.recorded(folder),
        shards=seen,
        folder=folder,
        repair=prune.repair,
        ridge=prune.ridge,
        digest=files.digest("losses", analysis, [prune.repair, prune.ridge, seen, *numerics]),
    )
    rooms, left = rooms_of(prune, budget, sites, present), budget.left(sites, prune, index)
    check_floors(rooms, left, budget.total, prune.ratio, inside_layers(rooms))
    return Spread(rooms, left, task)


def _curves(context: Context, spread: Spread) -> dict[str, Curve]:
    """The measured losses of every site that has room, and of the whole model."""
    task = _for_curves(spread.task, context.job.config.data.sequence_length)
    probes = [Probe(Site.from_key(key), measured_widths(one)) for key, one in sorted(spread.rooms.items())]
    probes = [probe for probe in probes if probe.widths]
    missing = [probe for probe in probes if read_losses(task.folder, probe, task.digest) is None]
    missing = [probe for probe in missing if not adopt(task, context.job.folder.parent, probe)]
    context.map(("sensitivity", "sites"), functools.partial(CurveMeter, task), missing)
    whole = _losses(context, task, [Trial("dense", ())])["dense"]
    return {
        probe.site.key: Curve(
            np.array([*probe.widths, spread.rooms[probe.site.key].width], dtype=np.float64),
            np.array([*_measured(task, probe), whole], dtype=np.float64),
        )
        for probe in probes
    }


def _for_curves(task: LossTask, length: int) -> LossTask:
    """Every site is measured at several widths: on the first held-out sequences only, where there are many."""
    few = task.sequences[: math.ceil(CURVE_TOKENS / length)]
    if few == task.sequences:
        return task
    return replace(task, sequences=few, digest=files.digest("curves", task.digest, [few.start, few.stop]))


def _losses(context: Context, task: LossTask, trials: list[Trial]) -> dict[str, float]:
    """Held-out loss by name; what was measured before is read back."""
    missing = [one for one in trials if read_losses(task.folder, one, task.digest) is None]
    context.map(("compare allocations", "plans"), functools.partial(PlanMeter, task), missing)
    return {one.name: _measured(task, one)[0] for one in trials}


def _measured(task: LossTask, item: Probe | Trial) -> tuple[float, ...]:
    losses = read_losses(task.folder, item, task.digest)
    if losses is None:
        raise RuntimeError(f"{item} was measured and is not there")
    return losses


def _tell(
    context: Context, spread: Spread, candidates: Mapping[str, Mapping[str, int]], losses: Mapping[str, float]
) -> str:
    """Choose the better allocation, tell the user and write the facts; returns its name."""
    kept = min(candidates, key=lambda name: losses[name])  # the first of equals
    data, widths = context.job.config.data, candidates[kept]
    scored = len(spread.task.sequences) * (data.sequence_length - 1)
    found = ", ".join(f"{name} {losses[name]:.4f}" for name in candidates)
    context.progress.note(f"allocation: {kept} widths kept; loss on {scored:,} held-out calibration tokens: {found}")
    ranges = _ranges(widths)
    if ranges:
        context.progress.note(f"allocation: {ranges}; load the checkpoint with cria_dist.load_pruned where they differ")
    rooms, measure = spread.rooms, context.job.config.prune.budget
    spent = {name: sum(rooms[key].cost(width) for key, width in one.items()) for name, one in candidates.items()}
    record = {
        "kept": kept,
        "losses": dict(losses),
        "held_out_tokens": scored,
        "budget": {"measure": measure, "left": spread.left, "spent": spent},
        "widths": candidates,
    }
    files.write_json(spread.task.folder / FACTS, record)
    return kept


def _ranges(widths: Mapping[str, int]) -> str:
    """Least and most units of a layer that stays, by kind, where they differ; and the layers that go."""
    gone = [Site.from_key(key).layer for key, width in widths.items() if key.endswith(f".{depth.PART}") and not width]
    by_part: dict[str, set[int]] = {}
    for key, width in widths.items():
        if width:
            by_part.setdefault(Site.from_key(key).part, set()).add(width)
    found = [f"{part} widths {min(some)} to {max(some)}" for part, some in sorted(by_part.items()) if len(some) > 1]
    return ", ".join([*found, *([f"without layers {', '.join(map(str, gone))}"] if gone else [])])
