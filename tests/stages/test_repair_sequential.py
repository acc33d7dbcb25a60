"""The sequential repair against least squares on what whole models compute, and its steps when some are done."""

import threading
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cria_dist.errors import ConfigError, DataError, NumericError
from cria_dist.maths.repair import Products, refit
from cria_dist.models import checkpoint, surgery
from cria_dist.models.blocks import Block
from cria_dist.models.family import family_of
from cria_dist.models.twin import TwinLayer
from cria_dist.records import Site
from cria_dist.stages import repair_sequential
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.stages.repair_sequential import SequentialRepairer
from cria_dist.stages.repair_steps import Advance, Observe, SequentialTask, Solve, Step, solver_bytes, steps
from cria_dist.store import sealed
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

SEQUENCES, LENGTH, SHARD = 40, 16, 16
SHARDS = 3
RIDGE = 1e-9
SITES = [Site(layer, part) for layer in range(2) for part in ("attention", "mlp")]
KEPT = {
    "layer-000.attention": (1,),
    "layer-000.mlp": tuple(range(5, 40)),
    "layer-001.attention": (0, 1),
    "layer-001.mlp": tuple(range(0, 48, 2)),
}
WIDTHS = {site.key: 2 if site.part == "attention" else 48 for site in SITES}


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("sequential") / "dense", mlp_bias=True)


@pytest.fixture(scope="module")
def record(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> RecordTask:
    """The dense model, recorded."""
    folder = tmp_path_factory.mktemp("recorded")
    tokens = np.random.default_rng(0).integers(0, 256, size=(SEQUENCES, LENGTH), dtype=np.int32)
    np.save(folder / "tokens.npy", tokens)
    recording, numerics = Recording(LocalStorage(folder), "none"), checkpoint.Numerics()
    parts = ("attention", "mlp")
    task = RecordTask(recording, dense, folder / "tokens.npy", numerics, "float32", SHARD, 8, 100, seed=0, parts=parts)
    recorder = Recorder(task)
    for shard in range(SHARDS):
        recorder(ShardWork(shard, Block(0, 2, 2)))
    recording.write_manifest(SITES, SHARDS)
    return task


@pytest.fixture
def task(record: RecordTask, tmp_path: Path) -> SequentialTask:
    return SequentialTask(record, KEPT, WIDTHS, RIDGE, tmp_path / "repair", "d1" * 32)


def carry_out(task: SequentialTask, left: list[Step] | None = None) -> None:
    worker = SequentialRepairer(task)
    for step in steps(task, SHARDS) if left is None else left:
        worker(step)


def solved(task: SequentialTask) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for site in SITES:
        found |= load_file(task.folder / f"{site.key}.safetensors")
    return found


def signals(model: torch.nn.Module, tokens: torch.Tensor, layer: int) -> tuple[np.ndarray, ...]:
    """Of a layer's MLP: what the output map reads, what it gives, and the stream behind it."""
    found: list[torch.Tensor] = []
    output = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    hooks = [
        output.register_forward_hook(lambda _, args, output: found.extend((args[0], output))),
        model.get_submodule(f"model.layers.{layer}").register_forward_hook(
            lambda _, args, output: found.append(output)
        ),
    ]
    with torch.inference_mode():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return tuple(one.flatten(0, 1).double().numpy() for one in found)


def test_the_last_site_is_the_best_there_is_behind_all_that_was_repaired(task: SequentialTask, dense: Path) -> None:
    """What is behind the last layer of the repaired model is as close to the dense one's as its map can bring it.

    With one shard there is none to hold out.
    """
    task = replace(task, record=replace(task.record, shard_sequences=SEQUENCES))
    carry_out(task, list(steps(task, 1)))
    tokens = torch.from_numpy(np.load(task.record.tokens_path)).long()
    config = checkpoint.read_config(dense)
    surgery.write_pruned(
        dense, task.folder / "pruned", surgery.Surgery(family_of(config), config, KEPT, repair=task.folder)
    )
    whole, left = (checkpoint.load_model(one, checkpoint.Numerics()) for one in (dense, task.folder / "pruned"))
    goal_TD = signals(whole, tokens, 1)[2]
    signal_TS, written_TD, stream_TD = signals(left, tokens, 1)
    wanted_TD = goal_TD - (stream_TD - written_TD)
    rows_TS = np.column_stack([signal_TS, np.ones(len(signal_TS))])
    best = np.linalg.lstsq(rows_TS, wanted_TD, rcond=None)[0].T
    repaired = solved(task)
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_allclose(repaired[f"{name}.weight"].numpy(), best[:, :-1], atol=2e-3)
    np.testing.assert_allclose(repaired[f"{name}.bias"].numpy(), best[:, -1], atol=2e-3)


def test_a_site_that_keeps_its_units_keeps_its_weights(task: SequentialTask, dense: Path) -> None:
    carry_out(task)
    name = "model.layers.1.self_attn.o_proj.weight"
    with checkpoint.open_tensors(dense) as tensors:
        assert torch.equal(solved(task)[name], tensors.read(name))
        assert not torch.equal(
            solved(task)["model.layers.0.self_attn.o_proj.weight"],
            tensors.read("model.layers.0.self_attn.o_proj.weight")[:, 16:],
        )


def test_the_steps_and_what_they_wait_for(task: SequentialTask) -> None:
    found = steps(task, SHARDS)
    heads, neurons = SITES[0], SITES[1]
    assert len(found) == 3 * SHARDS + 4 + SHARDS, "three sites to look at, four to solve, one layer to pass"
    assert found[Observe(heads, 1)] == ()
    assert found[Solve(heads)] == tuple(Observe(heads, shard) for shard in range(SHARDS))
    assert found[Observe(neurons, 2)] == (Solve(heads),)
    assert found[Advance(0, 1)] == (Solve(neurons),)
    assert found[Solve(SITES[2])] == tuple(Advance(0, shard) for shard in range(SHARDS)), "though its weights stay"
    assert found[Observe(SITES[3], 0)] == (Solve(SITES[2]),)
    order = {step: number for number, step in enumerate(found)}
    assert all(order[before] < order[step] for step, waits in found.items() for before in waits)


@pytest.mark.parametrize("done", [1, 4, 9, 12, 14])
def test_an_interrupted_repair_goes_on_and_ends_the_same(task: SequentialTask, done: int, tmp_path: Path) -> None:
    carry_out(task)
    again = replace(task, folder=tmp_path / "again")
    carry_out(again, list(steps(again, SHARDS))[:done])
    left = steps(again, SHARDS)
    assert len(left) <= len(steps(replace(task, folder=tmp_path / "never"), SHARDS)) - done
    carry_out(again)
    assert all(torch.equal(one, solved(task)[name]) for name, one in solved(again).items())
    assert steps(again, SHARDS) == {}


def test_lost_hidden_states_are_computed_again(task: SequentialTask) -> None:
    carry_out(task)
    expected = solved(task)
    (task.folder / f"{SITES[3].key}.safetensors").unlink()
    task.clear()
    left = list(steps(task, SHARDS))
    assert left[:SHARDS] == [Advance(0, shard) for shard in range(SHARDS)]
    carry_out(task)
    assert all(torch.equal(one, expected[name]) for name, one in solved(task).items())


def test_damaged_sums_are_named(task: SequentialTask) -> None:
    every = list(steps(task, SHARDS))
    carry_out(task, every[:SHARDS])
    path = task.sums.folder / Observe(SITES[0], 1).name
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is damaged"):
        carry_out(task)


def test_what_is_not_finite_is_named(task: SequentialTask, make_model: Callable[..., Path], tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken", mlp_bias=True)
    model = checkpoint.load_model(broken, checkpoint.Numerics())
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[7, 3] = float("nan")
    model.save_pretrained(broken)
    task = replace(task, record=replace(task.record, model_dir=broken))
    with pytest.raises(NumericError, match=r"layer-000\.mlp: sums of products have NaN"):
        carry_out(task)


def test_the_whole_model_runs_once_past_every_look(task: SequentialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sites to look at in two layers: the step past the first layer runs what is left of it alone."""
    ran: list[tuple[int, bool]] = []
    run = TwinLayer.run

    def counted(twin: TwinLayer, values: torch.Tensor, pruned: bool = False, site: Site | None = None) -> Any:
        ran.append((twin.layer, pruned))
        return run(twin, values, pruned, site)

    monkeypatch.setattr(TwinLayer, "run", counted)
    carry_out(task)
    batches = 5  # of 8, of shards of 16 in 40
    assert {kind: ran.count(kind) for kind in ran} == {
        (0, False): 2 * batches,
        (0, True): 3 * batches,
        (1, False): batches,
        (1, True): batches,
    }


@pytest.mark.parametrize(("size", "outputs"), [(700, 40), (300, 600)])
def test_a_solve_takes_no_more_than_it_is_said_to(size: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    rows, target = rng.normal(size=(4, 2 * size, size)), rng.normal(size=(4, 2 * size, outputs))
    start = rng.normal(size=(outputs, size))
    tracemalloc.start()
    sums = [Products(one.T @ one, one.T @ goal) for one, goal in zip(rows[:2], target[:2], strict=True)]
    refit(start, *sums, 1e-4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.7 * solver_bytes(size, outputs) < peak < solver_bytes(size, outputs)


def waited_for(found: Mapping[Step, tuple[Step, ...]], step: Step) -> set[Step]:
    """All that is surely done when a step starts, whoever does it."""
    return {one for before in found[step] for one in (before, *waited_for(found, before))}


@pytest.mark.parametrize("done", [0, 2, 5, 11])
@pytest.mark.parametrize("unchanged", [(), (0,), (1,), (2,), (3,), (0, 2), (1, 2), (0, 1), (2, 3)])
def test_no_step_starts_before_all_that_it_reads(task: SequentialTask, unchanged: tuple[int, ...], done: int) -> None:
    """Also where sites keep all their units, and where some sums are there and hidden states are not."""
    kept = {site.key: tuple(range(WIDTHS[site.key] - (number not in unchanged))) for number, site in enumerate(SITES)}
    task = replace(task, kept=kept)
    for step in list(steps(task, SHARDS))[:done]:
        if isinstance(step, Observe):
            sealed.write(task.sums, step.name, {"gram": torch.zeros(1)})
    found = steps(task, SHARDS)
    for step in found:
        before = waited_for(found, step)
        site = step.site if isinstance(step, Observe | Solve) else Site(step.layer + 1, "")
        assert {Solve(one) for one in SITES if one < site} <= before, step
        if not isinstance(step, Solve) and site.layer > isinstance(step, Advance):
            assert Advance(0, step.shard) in before, step


def test_what_is_solved_is_waited_for_and_its_absence_is_no_default(
    task: SequentialTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node may have solved it, and a network file system may not show it yet."""
    carry_out(task, list(steps(task, SHARDS))[: SHARDS + 1])
    path = task.folder / f"{SITES[0].key}.safetensors"
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(repair_sequential, "PATIENCE", 0.5)
    with pytest.raises(DataError, match=r"layer-000\.attention\.safetensors is not there"):
        SequentialRepairer(task)(Observe(SITES[1], 0))
    monkeypatch.setattr(repair_sequential, "PATIENCE", 60.0)
    threading.Timer(0.3, path.write_bytes, [content]).start()
    SequentialRepairer(task)(Observe(SITES[1], 0))
    assert Observe(SITES[1], 0).name in task.sums.sizes("")


def test_a_gpu_without_memory_gets_smaller_batches(task: SequentialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out(task)
    expected, run = solved(task), TwinLayer.run

    def small(twin: TwinLayer, values: torch.Tensor, pruned: bool = False, site: Site | None = None) -> Any:
        if len(values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(twin, values, pruned, site)

    monkeypatch.setattr(TwinLayer, "run", small)
    room, again = 3, replace(task, folder=task.folder / "again")
    carry_out(again)
    assert all(torch.allclose(one, solved(again)[name], atol=1e-3) for name, one in expected.items())
    room = 0
    with pytest.raises(ConfigError, match=r"shard 0: out of GPU memory; set prune\.repair=least_squares"):
        carry_out(replace(task, folder=task.folder / "never"))


def test_few_sequences_are_not_held_out_alone(task: SequentialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 34 sequences in shards of 16 the last two are no test of the ridge."""
    tokens = task.record.tokens_path.with_name("fewer.npy")
    np.save(tokens, np.load(task.record.tokens_path)[:34])
    short = replace(task, record=replace(task.record, tokens_path=tokens))
    fitted: list[float] = []

    def noted(start: Any, given: Products, held_out: Products, ridge: float) -> Any:
        fitted.append(given.gram_SS[-1, -1])  # of the bias' column: tokens
        return refit(start, given, held_out, ridge)

    monkeypatch.setattr(repair_sequential, "refit", noted)
    for number, one in enumerate((task, short)):
        one = replace(one, folder=one.folder / str(number))
        carry_out(one, list(steps(one, SHARDS))[: 2 * SHARDS + 2])
    assert fitted[1::2] == [2 * SHARD * LENGTH, SHARD * LENGTH]


def test_an_interrupted_repair_of_another_plan_leaves_nothing(task: SequentialTask) -> None:
    other = replace(task, digest="d2" * 32)
    for one in (task, other):
        carry_out(one, list(steps(one, SHARDS))[: 3 * SHARDS + 2])

    def left(digest: str) -> list[Path]:
        return [path for path in task.folder.rglob("*.safetensors") if digest[:16] in path.parts]

    theirs, ours = left(task.digest), left(other.digest)
    assert len(theirs) == len(ours) == 4 * SHARDS, "sums of two sites, hidden states of both models"
    other.clear_others()
    assert (left(task.digest), left(other.digest)) == ([], ours)
