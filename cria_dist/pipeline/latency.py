"""The budget of a run in milliseconds: measured once, kept in the run folder, shared with neighbouring runs.

Where layers differ in width, what is measured is the model with all of them as wide as the widest; what narrower ones
take is read off its times.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

from cria_dist import files
from cria_dist.machine import cpus
from cria_dist.maths.allocation_curves import measured_widths
from cria_dist.maths.allocation_rooms import Room
from cria_dist.models import depth
from cria_dist.models.mlp import layers_differ
from cria_dist.models.widths import alike
from cria_dist.pipeline.context import Context
from cria_dist.records import Site
from cria_dist.report.versions import machine_and_versions
from cria_dist.stages.budget import Budget, multiple_of, sites_of
from cria_dist.stages.job import Job
from cria_dist.stages.layer_times import LayerTimer, LayerTimes, TimingTask

FILE = "latency-{}.json"


def settings(context: Context) -> list[object]:
    """What a decision depends on beside the settings where the budget is time: the times as they were measured."""
    return [files.digest(table(context).read_bytes())] if context.job.config.prune.budget == "latency" else []


def budget(context: Context) -> Budget:
    """What a unit of each site costs, in milliseconds of the whole model."""
    job = context.job
    record = files.read_json(table(context))
    parts = {part: tuple((int(width), float(time)) for width, time in rows) for part, rows in record["parts"].items()}
    times = LayerTimes(record["model_ms"], record["layer_ms"], parts)
    return budget_of_times(times, sites_of(job.config, job.family, job.model_config), _staying(job))


def budget_of_times(times: LayerTimes, sites: Mapping[Site, int], staying: Mapping[Site, int]) -> Budget:
    """The same from a table of times; what is in no part of a layer goes with the layer.

    Args:
        times: of a model whose layers are alike, each as wide as the widest.
        sites: units of those that a run may remove.
        staying: units of the others that are narrower than in the table.
    """
    units = {site: width for site, width in sites.items() if site.part != depth.PART}
    widest = {part: rows[-1][1] for part, rows in times.parts.items()}
    missing = {site: _missing(times.parts[site.part], width) for site, width in {**units, **staying}.items()}
    cost = {site: (widest[site.part] - missing[site]) / width for site, width in units.items()}
    for whole in sites.keys() - units.keys():
        inside = [site for site in missing if site.layer == whole.layer]
        elsewhere = sum(widest[site.part] if site in units else missing[site] for site in inside)
        cost[whole] = max(times.layer_ms - elsewhere, 0.0)
    return Budget(cost, times.model_ms - sum(missing.values()), {site: times.parts[site.part] for site in units})


def _missing(rows: tuple[tuple[int, float], ...], width: int) -> float:
    """Milliseconds that a site of this width takes less than the widest of the table."""
    widest, takes = rows[-1]
    room = Room(widest, widest, widest, takes / widest, rows)
    return room.cost(widest) - room.cost(width)


def _staying(job: Job) -> dict[Site, int]:
    """Units of the sites that nothing is removed from and that have fewer than the stock class would give them."""
    parts = [part for part in job.family.parts if part not in job.config.prune.parts]
    stock = job.family.widths(alike(job.model_config), parts)
    return {site: width for site, width in job.family.widths(job.model_config, parts).items() if width != stock[site]}


def table(context: Context) -> Path:
    """The file with the times; measured if no run has it, which must have the machine to itself."""
    job, prune = context.job, context.job.config.prune
    stock, parts = alike(job.model_config), {site.part for site in (*job.widths, *_staying(job))}
    first = {site: width for site, width in job.family.widths(stock, parts).items() if site.layer == 0}
    multiple = {site: multiple_of(prune, site) for site in first}
    widths = {
        site.part: (*measured_widths(Room(width, multiple[site], multiple[site], 1.0)), width)
        for site, width in first.items()
    }
    length, numerics = job.config.data.sequence_length, job.numerics
    machine = [machine_and_versions()["machine"], context.pool.on_gpus]
    described = [stock, widths, prune.latency, length, numerics.dtype, numerics.matmul, *machine]
    path = job.folder / FILE.format(files.digest("times of layers and head", described)[:16])
    if not (path.is_file() or files.take_copy(job.folder.parent, f"*/{path.name}", path)):
        task = TimingTask(stock, widths, prune.latency, length, numerics, cpus(), path)
        context.pool.release()  # the timed process must have the machine to itself
        found = context.map(("measure latency", "models"), functools.partial(LayerTimer, task), ["layers"], workers=1)
        widest = ", all as wide as the widest" if layers_differ(job.model_config) else ""
        context.progress.note(
            f"latency: {prune.latency} of {length} tokens takes {found['layers'].model_ms:.1f} ms, "
            f"{found['layers'].layer_ms:.2f} of them in each layer{widest}"
        )
    return path
