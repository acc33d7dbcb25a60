"""The budget of a run in milliseconds: measured once, kept in the run folder, shared with neighbouring runs."""

import functools
import os
from pathlib import Path

from cria_dist import files
from cria_dist.maths.allocation_curves import measured_widths
from cria_dist.maths.allocation_rooms import Room
from cria_dist.models import depth
from cria_dist.pipeline.context import Context
from cria_dist.records import Site
from cria_dist.report.versions import machine_and_versions
from cria_dist.stages.budget import Budget, multiple_of, sites_of
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
    return budget_of_times(times, sites_of(job.config, job.family, job.model_config))


def budget_of_times(times: LayerTimes, sites: dict[Site, int]) -> Budget:
    """The same from a table of times and the units per site; what is in no part of a layer goes with the layer."""
    inside = sum(rows[-1][1] for rows in times.parts.values())
    rest = max(times.layer_ms - inside, 0.0)
    cost = {
        site: rest if site.part == depth.PART else times.parts[site.part][-1][1] / width
        for site, width in sites.items()
    }
    return Budget(cost, times.model_ms, {site: times.parts[site.part] for site in sites if site.part != depth.PART})


def table(context: Context) -> Path:
    """The file with the times; measured if no run has it, which must have the machine to itself."""
    job, prune = context.job, context.job.config.prune
    first = {site.part: (width, multiple_of(prune, site)) for site, width in job.widths.items() if site.layer == 0}
    widths = {
        part: (*measured_widths(Room(width, multiple, multiple, 1.0)), width)
        for part, (width, multiple) in first.items()
    }
    length, numerics = job.config.data.sequence_length, job.numerics
    machine = [machine_and_versions()["machine"], context.pool.on_gpus]
    described = [dict(job.model_config), widths, prune.latency, length, numerics.dtype, numerics.matmul, *machine]
    path = job.folder / FILE.format(files.digest("times of layers and head", described)[:16])
    if not (path.is_file() or files.take_copy(job.folder.parent, f"*/{path.name}", path)):
        task = TimingTask(job.model_config, widths, prune.latency, length, numerics, os.cpu_count() or 1, path)
        context.pool.release()  # the timed process must have the machine to itself
        found = context.map(("measure latency", "models"), functools.partial(LayerTimer, task), ["layers"], workers=1)
        context.progress.note(
            f"latency: {prune.latency} of {length} tokens takes {found['layers'].model_ms:.1f} ms, "
            f"{found['layers'].layer_ms:.2f} of them in each layer"
        )
    return path
