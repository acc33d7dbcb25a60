"""How a recording is laid out: which blocks of layers, in which order, on how many workers, and why.

``replicate``: every worker holds the whole model. ``sweep``: the workers go through the model block by block.
``pipeline``: every worker keeps one block and the shards pass through. ``tensor``: several workers share every layer.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from cria_dist.config import RunConfig
from cria_dist.models.blocks import Block, partition
from cria_dist.models.family import ModelDict, family_of
from cria_dist.pool import Flow, Pool
from cria_dist.records import Site
from cria_dist.stages.record import ShardWork

Kind = Literal["replicate", "sweep", "pipeline", "tensor"]


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
    del pool
    total = len({site.layer for site in family_of(model_config).widths(model_config)})
    return Schedule("replicate", partition(total, 1), "every worker holds the whole model")


def pending(
    schedule: Schedule, shards: int, committed: Collection[tuple[Site, int]], boundaries: Collection[tuple[int, int]]
) -> list[ShardWork]:
    """The work items that are left, block by block.

    An item is left if one of its sites is not committed, or if the item after it is left and the hidden states between
    them are not there.

    Args:
        schedule: the blocks.
        shards: number of shards.
        committed: every (site, shard) that is finished.
        boundaries: every (layer, shard) whose hidden states are stored.
    """
    layers = {(site.layer, shard) for site, shard in committed}
    left: list[ShardWork] = []
    for shard in range(shards):
        wanted_after = False
        for block in reversed(schedule.blocks):
            recorded = all((layer, shard) in layers for layer in range(block.first, block.stop))
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
    return Flow({item: earlier for item, earlier in after.items() if earlier in known}, homes)


def _before(schedule: Schedule, block: Block) -> Block:
    return schedule.blocks[schedule.blocks.index(block) - 1]
