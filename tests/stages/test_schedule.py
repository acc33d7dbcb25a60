"""Which schedule is chosen and why; no schedule, and no change of schedule, changes what is recorded."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block, partition
from cria_dist.pipeline import Context, prune
from cria_dist.pool import Flow, LocalPool
from cria_dist.records import Site
from cria_dist.stages import schedule
from cria_dist.stages.footprint import Workload, in_units
from cria_dist.stages.record import ShardWork
from cria_dist.stages.schedule import Kind, Schedule, decide

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
GB = 10**9
LAYERS = 4


@pytest.fixture(scope="module")
def work(run_config: RunConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """Llama-2-7B in bfloat16, 128 sequences of 2048 tokens, 4 at a time."""
    config = run_config(
        tmp_path_factory.mktemp("work"),
        model={"dtype": "bfloat16"},
        data={"sequence_length": 2048, "calibration_sequences": 128},
        record={"tokens": 4096, "shard_sequences": 8, "batch_sequences": 4},
    )
    return Workload(config, LLAMA_7B)


def test_the_arithmetic_of_a_whole_model(work: Workload) -> None:
    need = work.footprint(Block(0, 32, 32))
    assert need.weights == 2 * (6_738_415_616 - 32000 * 4096), "all but the head, in 16 bits"
    assert need.moments == 4 * 32 * (11008 * 11008 + 11008)
    hidden_and_mlp = 4 * 2048 * (4096 * 16 + 11008 * (4 * 2 + 4))
    signals = 3 * 256 * 2 * 11008
    assert need.data == 32 * signals + hidden_and_mlp + 2 * signals + 2 * 4 * 11008**2


def test_the_arithmetic_of_a_block(work: Workload) -> None:
    layer = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
    first, middle, last = (work.footprint(block) for block in partition(32, 3))
    assert middle.weights == 11 * layer + 2 * 4096
    assert first.weights == 10 * layer + 2 * 4096 + 2 * 32000 * 4096
    state = 8 * 2048 * 4096 * 2
    assert middle.data == last.data, "both read and write files, or room for it is kept"
    assert middle.data - first.data == state + 3 * 256 * 2 * 11008, "one layer more, and hidden states before it"


def test_workers_that_share_a_layer_share_its_memory(work: Workload) -> None:
    alone, shared = (work.footprint(Block(0, 32, 32), ranks) for ranks in (1, 4))
    assert shared.moments == alone.moments // 4
    whole_parts = 2 * (2 * 32000 * 4096 + 4096)  # embedding, head, norm
    layers = alone.weights - 2 * (32000 * 4096 + 4096)
    assert shared.weights == layers // 4 + whole_parts


@pytest.mark.parametrize(
    ("workers", "memory", "kind", "blocks", "reason"),
    [
        (1, 80, "replicate", 1, r"fit 80 GB per worker; one worker holds the whole model"),
        (8, 32, "replicate", 1, r"\+ 15\.5 GB of moments \+ .* fit 32 GB .* each of 8 workers holds"),
        (8, 22, "pipeline", 8, r"13\.2 GB of weights \+ 15\.5 GB .* > 22 GB per worker; 8 workers hold 4 layers each"),
        (5, 22, "pipeline", 5, r"5 workers hold 6-7 layers each"),
        (64, 22, "pipeline", 32, r"32 workers hold 1 layer each"),
        (1, 22, "sweep", 2, r"> 22 GB per worker; 2 blocks of 16 layers, one after the other"),
        (2, 11, "sweep", 4, r"4 blocks of 8 layers, one after the other"),
        (1, 5, "sweep", 17, r"17 blocks of 1-2 layers"),
    ],
)  # fmt: skip
def test_the_first_schedule_that_fits(
    workers: int, memory: int, kind: str, blocks: int, reason: str, work: Workload
) -> None:
    found = decide(work, workers, memory * GB)
    assert (found.kind, len(found.blocks), found.ranks) == (kind, blocks, 1)
    assert all(work.footprint(block).total <= memory * GB for block in found.blocks)
    assert re.search(reason, found.reason), found.reason


def test_a_sweep_takes_the_longest_blocks_that_fit(work: Workload) -> None:
    for memory in (5 * GB, 8 * GB, 14 * GB, 22 * GB):
        count = len(decide(work, 1, memory).blocks)
        assert schedule.peak(work, partition(32, count - 1), 1).total > memory


def test_as_many_workers_as_can_share_every_layer(work: Workload) -> None:
    found = decide(work, 4, 80 * GB, "tensor")
    assert (found.kind, found.ranks, len(found.blocks)) == ("tensor", 4, 1)
    assert "4 workers share every layer" in found.reason
    flow = schedule.flow(found, [ShardWork(0, found.blocks[0])])
    assert (flow.ranks, flow.homes, flow.after) == (4, {}, {})


def test_what_agrees_only_nearly_must_be_asked_for(work: Workload) -> None:
    """Where only a shared layer would fit, ``auto`` says so and takes nothing."""
    available = schedule.peak(work, *(schedule.best_layout("tensor", work, 32, 0) or ((), 0))).total
    smallest = schedule.best_layout("sweep", work, 32, 0)
    assert smallest is not None
    assert available < schedule.peak(work, *smallest).total
    with pytest.raises(
        ConfigError, match=r"^one layer needs .*; record\.schedule=tensor would fit \(32 workers share "
    ):
        decide(work, 32, available)
    assert decide(work, 32, available, "tensor").ranks == 32
    with pytest.raises(ConfigError) as refusal:
        decide(work, 32, available - 1)
    assert "tensor" not in str(refusal.value)


@pytest.mark.parametrize(
    ("wanted", "workers", "memory", "message"),
    [
        ("auto", 1, 1, r"^one layer needs 4\.19 GB per worker \(667 MB of weights \+ 485 MB of moments .*there "
         r"are 1 GB; lower record\.batch_sequences or record\.shard_sequences, or raise record\.memory_gb"),
        ("auto", 8, 1, r"^one layer needs .*there are 1 GB"),
        ("sweep", 1, 1, r"^one layer needs .*there are 1 GB"),
        ("replicate", 8, 22, r"^record\.schedule=replicate needs 31\.9 GB per worker .* and there are 22 GB; use "
         r"record\.schedule=auto, lower"),
        ("pipeline", 2, 8, r"^record\.schedule=pipeline needs 1\d\.\d GB per worker .* there are 8 GB"),
        ("pipeline", 33, 80, r"33 workers are more than the 32 layers; set run\.workers=32 or record\.schedule=auto"),
        ("pipeline", 1, 80, r"record\.schedule=pipeline needs at least 2 workers and there is 1; raise run\.workers"),
        ("tensor", 1, 80, r"record\.schedule=tensor needs at least 2 workers and there is 1"),
        ("tensor", 3, 80, r"record\.schedule=tensor: 3 ranks cannot share 32 attention heads, .*11008 MLP units"),
        ("tensor", 2, 9, r"^record\.schedule=tensor shared by 2 workers needs .* there are 9 GB"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    wanted: Kind, workers: int, memory: int, message: str, work: Workload
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        decide(work, workers, memory * GB, wanted)
    assert "\n" not in str(refusal.value)


def test_float32_has_another_remedy(run_config: RunConfigMaker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set model\.dtype=bfloat16, lower record\.batch_sequences"):
        decide(Workload(run_config(tmp_path), LLAMA_7B), 1, GB // 2)


def test_smaller_batches_and_shards_need_less(run_config: RunConfigMaker, tmp_path: Path) -> None:
    def need(**record: int) -> int:
        config = run_config(tmp_path, data={"calibration_sequences": 64, "sequence_length": 512}, record=record)
        return Workload(config, LLAMA_7B).footprint(Block(1, 2, 32)).total

    assert (
        need(batch_sequences=2)
        < need(batch_sequences=4, shard_sequences=4)
        < need(batch_sequences=4, shard_sequences=8)
    )
    assert need(batch_sequences=99, shard_sequences=8) == need(batch_sequences=8, shard_sequences=8)


@pytest.mark.parametrize(
    ("size", "text"), [(13.5e9, "13.5 GB"), (4.209e12, "4.21 TB"), (999, "0.999 kB"), (2e6, "2 MB")]
)
def test_bytes_in_words(size: float, text: str) -> None:
    assert in_units(size) == text


# what is left to do

BLOCKS = partition(LAYERS, 2)
SWEEP = Schedule("sweep", BLOCKS, "")


def pending(
    layout: Schedule, shards: int, committed: set[tuple[Site, int]], boundaries: set[tuple[int, int]]
) -> list[ShardWork]:
    """Of the MLPs of all layers, and of a further site of the second one."""
    return schedule.pending(layout, shards, committed, boundaries, [*map(Site, range(LAYERS)), Site(1, "attention")])


def done(*pairs: tuple[int, int]) -> set[tuple[Site, int]]:
    further = {(Site(1, "attention"), shard) for layer, shard in pairs if layer == 1}
    return {(Site(layer), shard) for layer, shard in pairs} | further


def test_everything_is_left_at_first() -> None:
    left = pending(SWEEP, 3, set(), set())
    assert left == [ShardWork(shard, block) for block in BLOCKS for shard in range(3)]


def test_finished_items_are_not_left() -> None:
    committed = done((0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (3, 1))
    assert pending(SWEEP, 2, committed, {(2, 0)}) == [ShardWork(0, BLOCKS[1])]


def test_an_item_is_repeated_when_its_hidden_states_are_gone() -> None:
    committed = done((0, 0), (1, 0))
    assert pending(SWEEP, 1, committed, set()) == [ShardWork(0, block) for block in BLOCKS]
    other = {(1, 0)}  # left by blocks of another length: of no use
    assert pending(SWEEP, 1, committed, other) == [ShardWork(0, block) for block in BLOCKS]


def test_half_a_block_is_not_a_block() -> None:
    assert pending(SWEEP, 1, done((0, 0), (1, 0), (2, 0)), {(2, 0)}) == [ShardWork(0, BLOCKS[1])]
    whole = Schedule("replicate", partition(LAYERS, 1), "")
    assert pending(whole, 1, done((0, 0), (1, 0), (2, 0)), {(2, 0)}) == [ShardWork(0, Block(0, 4, 4))]


def test_a_site_is_lost_and_a_layer_may_have_none() -> None:
    there = done((0, 0), (1, 0), (2, 0), (3, 0))
    assert pending(SWEEP, 1, there, {(2, 0)}) == []
    assert pending(SWEEP, 1, there - {(Site(1, "attention"), 0)}, {(2, 0)}) == [ShardWork(0, BLOCKS[0])]
    by_layer = Schedule("sweep", partition(LAYERS, LAYERS), "")
    left = schedule.pending(by_layer, 1, done((0, 0)), {(1, 0)}, [Site(0), Site(2)])
    assert [work.block.first for work in left] == [1, 2], "the second layer has no site, and leads to the third"


def test_a_pipeline_keeps_blocks_at_home() -> None:
    pipeline = Schedule("pipeline", BLOCKS, "")
    items = pending(pipeline, 2, set(), set())
    flow = schedule.flow(pipeline, items)
    assert {str(item): home for item, home in flow.homes.items()} == {
        "shard 0, layers 0-1": 0, "shard 1, layers 0-1": 0, "shard 0, layers 2-3": 1, "shard 1, layers 2-3": 1,
    }  # fmt: skip
    assert flow.after == {ShardWork(shard, BLOCKS[1]): (ShardWork(shard, BLOCKS[0]),) for shard in (0, 1)}
    assert schedule.flow(pipeline, items[3:]).after == {}, "what is finished need not be waited for"


# the same bytes under every schedule


class TwoWorkers(LocalPool):
    """Says it has two workers; stops after so many items."""

    workers = 2

    def __init__(self, last: int | None = None) -> None:
        self.done: list[Any] = []
        self._last = last

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        workers: int | None = None,
        flow: Flow[Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        for item, result in super().map(make_worker, items, workers, flow):
            self.done.append(item)
            yield item, result
            if len(self.done) == self._last:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def deep(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=LAYERS)


@pytest.fixture
def under(run_config: RunConfigMaker, deep: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``under("sweep", 3)``: the run under a schedule with so many blocks."""

    def make(kind: Kind, blocks: int = 1, root: Path = tmp_path) -> RunConfig:
        config = run_config(root, model={"path": str(deep)}, record={"schedule": kind})
        need = schedule.peak(Workload(config, checkpoint.read_config(deep)), partition(LAYERS, blocks), 1).total
        record = config.record.model_copy(update={"memory_gb": (need + 10) / 1e9})
        return config.model_copy(update={"record": record})

    return make


@pytest.fixture(scope="module")
def clean(
    run_config: RunConfigMaker, make_context: MakeContext, deep: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a run leaves that holds the whole model and is not interrupted."""
    config = run_config(tmp_path_factory.mktemp("clean"), model={"path": str(deep)}, record={"memory_gb": 4})
    pool = TwoWorkers()
    context = make_context(config, pool)
    prune(context, until="record")
    assert len(pool.done) == 3
    return contents(context.job.folder / "round-00")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


CASES: list[tuple[Kind, int]] = [("pipeline", 2), ("sweep", 2), ("sweep", 3), ("sweep", 4)]


@pytest.mark.parametrize(("kind", "blocks"), CASES)
def test_a_schedule_changes_no_byte(
    kind: Kind, blocks: int, under: Callable[..., RunConfig], make_context: MakeContext, clean: dict[str, bytes]
) -> None:
    pool = TwoWorkers()
    context = make_context(under(kind, blocks), pool)
    prune(context, until="record")
    assert len(pool.done) == 3 * blocks
    assert contents(context.job.folder / "round-00") == clean


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("replicate", 1, 1), ("sweep", 4, 8)),
        (("sweep", 2, 4), ("replicate", 1, 2)),
        (("pipeline", 2, 2), ("replicate", 1, 3)),
        (("pipeline", 2, 3), ("sweep", 4, 6)),
        (("sweep", 3, 5), ("pipeline", 2, 4)),
        (("sweep", 4, 9), ("sweep", 2, 6)),
        (("sweep", 4, 6), ("sweep", 2, 3)),
    ],
)
def test_a_run_goes_on_under_another_schedule(
    first: tuple[Kind, int, int],
    second: tuple[Kind, int, int],
    under: Callable[..., RunConfig],
    make_context: MakeContext,
    clean: dict[str, bytes],
) -> None:
    """Schedule, blocks, items done. What is committed is kept; hidden states nobody needs are cleared away."""
    with pytest.raises(KeyboardInterrupt):
        prune(make_context(under(*first[:2]), TwoWorkers(first[2])), until="record")
    pool = TwoWorkers()
    context = make_context(under(*second[:2]), pool)
    prune(context, until="record")
    assert len(pool.done) == second[2], [str(item) for item in pool.done]
    assert contents(context.job.folder / "round-00") == clean
