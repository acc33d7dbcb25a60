"""How a recording is laid out: which blocks of layers, in which order, on how many workers, and why.

``replicate``: every worker holds the whole model. ``sweep``: the workers go through the model block by block.
``pipeline``: every worker keeps one block and the shards pass through. ``tensor``: several workers share every layer.
"""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models.blocks import Block, partition
from cria_dist.models.mlp import ModelDict
from cria_dist.models.tensor_parallel import tensor_ranks_problem
from cria_dist.pool import Flow, Pool
from cria_dist.records import Site
from cria_dist.stages import memory
from cria_dist.stages.footprint import Footprint, Workload, in_units
from cria_dist.stages.record import ShardWork

Kind = Literal["replicate", "pipeline", "sweep", "tensor"]
AUTO: tuple[Kind, ...] = ("replicate", "pipeline", "sweep")
"""In the order ``auto`` tries them: the first moves the fewest bytes. All give the same bytes, with any workers;
``tensor`` agrees to 1e-6 only, so that what is recorded would depend on them: it must be asked for."""
KINDS: tuple[Kind, ...] = (*AUTO, "tensor")
Layout = tuple[tuple[Block, ...], int]
"""Blocks, and the workers that share a layer."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A chosen schedule.

    Attributes:
        kind: its name.
        blocks: the parts of the model, in order.
        reason: why it was chosen, one sentence.
        ranks: workers that share a layer (``tensor``); 1 otherwise.
    """

    kind: Kind
    blocks: tuple[Block, ...]
    reason: str
    ranks: int = 1


def choose(config: RunConfig, model_config: ModelDict, pool: Pool) -> Schedule:
    """The schedule asked for, or the best one for model, workers and memory.

    Raises:
        ConfigError: no schedule fits, or the one asked for does not.
    """
    return decide(Workload(config, model_config), pool.workers, memory.of_worker(config, pool), config.record.schedule)


def decide(work: Workload, workers: int, available: int, wanted: Kind | Literal["auto"] = "auto") -> Schedule:
    """The schedule asked for, or the first that fits of replicate, pipeline, sweep.

    Args:
        work: model and recording, in numbers.
        workers: how many there are.
        available: bytes each of them may use.
        wanted: a schedule, or ``auto``.

    Raises:
        ConfigError: no schedule fits, or the one asked for does not.
    """
    if wanted != "auto":
        _check_workers(work, workers, wanted)
    need = work.footprint(Block(0, work.layers, work.layers))
    why = f"{need} {'fit' if need.total <= available else '>'} {in_units(available)} per worker"
    for kind in AUTO if wanted == "auto" else (wanted,):
        layout = best_layout(kind, work, workers, available)
        if layout is not None and peak(work, *layout).total <= available:
            return Schedule(kind, layout[0], f"{why}; {in_words(kind, layout, workers)}", layout[1])
    raise ConfigError(_nothing_fits(work, workers, available, wanted))


def best_layout(kind: Kind, work: Workload, workers: int, available: int) -> Layout | None:
    """The longest blocks that fit, or the shortest there are; layers are shared by as many workers as can."""
    layout = None
    for layout in _layouts(kind, work, workers):
        if peak(work, *layout).total <= available:
            break
    return layout


def peak(work: Workload, blocks: tuple[Block, ...], ranks: int) -> Footprint:
    """Memory of the worker that needs most."""
    return max((work.footprint(block, ranks) for block in blocks), key=lambda need: need.total)


def in_words(kind: Kind, layout: Layout, workers: int) -> str:
    """Who holds what."""
    blocks, ranks = layout
    lengths = sorted({block.stop - block.first for block in blocks})
    layers = f"{'-'.join(map(str, lengths))} layer{'s' if lengths != [1] else ''}"
    if kind == "replicate":
        return f"each of {workers} workers holds the whole model" if workers > 1 else "one worker holds the whole model"
    if kind == "pipeline":
        return f"{len(blocks)} workers hold {layers} each"
    if kind == "tensor":
        return f"{ranks} workers share every layer"
    return f"{len(blocks)} block{'s' if len(blocks) > 1 else ''} of {layers}, one after the other"


def pending(
    schedule: Schedule,
    shards: int,
    committed: Collection[tuple[Site, int]],
    boundaries: Collection[tuple[int, int]],
    sites: Collection[Site],
) -> list[ShardWork]:
    """The work items that are left, block by block.

    An item is left if one of its sites is not committed, or if the item after it is left and the hidden states between
    them are not there.

    Args:
        schedule: the blocks.
        shards: number of shards.
        committed: every (site, shard) that is finished.
        boundaries: every (layer, shard) whose hidden states are stored.
        sites: all that are recorded; some layers may have none.
    """
    left: list[ShardWork] = []
    for shard in range(shards):
        wanted_after = False
        for block in reversed(schedule.blocks):
            recorded = all((site, shard) in committed for site in sites if block.first <= site.layer < block.stop)
            if not recorded or (wanted_after and (block.stop, shard) not in boundaries):
                left.append(ShardWork(shard, block))
                wanted_after = True
            else:
                wanted_after = False
    return sorted(left, key=lambda work: (work.block, work.shard))


def flow(schedule: Schedule, items: list[ShardWork]) -> Flow[ShardWork]:
    """What must come before what, and which worker keeps which block."""
    after = {item: ShardWork(item.shard, _before(schedule, item.block)) for item in items if not item.block.is_first}
    known = set(items)
    homes = {item: schedule.blocks.index(item.block) for item in items} if schedule.kind == "pipeline" else {}
    return Flow({item: (earlier,) for item, earlier in after.items() if earlier in known}, homes, ranks=schedule.ranks)


def _before(schedule: Schedule, block: Block) -> Block:
    return schedule.blocks[schedule.blocks.index(block) - 1]


def _layouts(kind: Kind, work: Workload, workers: int) -> Iterator[Layout]:
    """What a schedule may use, the best first, the smallest last."""
    whole = partition(work.layers, 1)
    if kind == "replicate":
        yield whole, 1
    elif kind == "pipeline":
        if workers > 1:
            yield partition(work.layers, min(workers, work.layers)), 1
    elif kind == "sweep":
        for count in range(1, work.layers + 1):
            yield partition(work.layers, count), 1
    elif not work.records_hidden and work.parts == ("mlp",):
        legal = (ranks for ranks in range(workers, 1, -1) if tensor_ranks_problem(work.model_config, ranks) is None)
        yield from ((whole, ranks) for ranks in itertools.islice(legal, 1))


def _check_workers(work: Workload, workers: int, kind: Kind) -> None:
    """Refuse a schedule that this number of workers cannot carry out."""
    if kind in ("pipeline", "tensor") and workers < 2:
        raise ConfigError(
            f"record.schedule={kind} needs at least 2 workers and there is 1; raise run.workers or use "
            "record.schedule=sweep"
        )
    if kind == "pipeline" and workers > work.layers:
        raise ConfigError(
            f"record.schedule=pipeline gives every worker at least one layer, and {workers} workers are more than the "
            f"{work.layers} layers; set run.workers={work.layers} or record.schedule=auto"
        )
    problem = tensor_ranks_problem(work.model_config, workers) if kind == "tensor" else None
    if problem is not None:
        raise ConfigError(f"record.schedule=tensor: {problem}")


def _nothing_fits(work: Workload, workers: int, available: int, wanted: Kind | Literal["auto"]) -> str:
    """The smallest layout there is, what it needs, and what to do."""
    smallest = [best_layout(kind, work, workers, 0) for kind in (AUTO if wanted == "auto" else (wanted,))]
    blocks, ranks = min((layout for layout in smallest if layout), key=lambda layout: peak(work, *layout).total)
    need = peak(work, blocks, ranks)
    what = "one layer" if len(blocks) == work.layers else f"record.schedule={wanted}"
    sharing = f" shared by {ranks} workers" if ranks > 1 else ""
    other = "" if wanted in ("auto", "sweep", "tensor") else "use record.schedule=auto, "
    dtype = "" if work.itemsize < 4 else "set model.dtype=bfloat16, "
    return (
        f"{what}{sharing} needs {in_units(need.total)} per worker ({need}) and there are {in_units(available)}; "
        f"{other}{dtype}lower record.batch_sequences or record.shard_sequences, or raise record.memory_gb "
        f"or the memory of the workers{_tensor_fits(work, workers, available) if wanted == 'auto' else ''}"
    )


def _tensor_fits(work: Workload, workers: int, available: int) -> str:
    """What must be asked for, where it would help."""
    layout = best_layout("tensor", work, workers, available)
    if layout is None or (need := peak(work, *layout)).total > available:
        return ""
    shared = in_words("tensor", layout, workers)
    return f"; record.schedule=tensor would fit ({shared}: {in_units(need.total)}), with results equal to 1e-6 only"
