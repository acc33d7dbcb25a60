"""The residual stream around the layers: what is stored is what the model computed, and only where it is asked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from cria_dist.config import RunConfig
from cria_dist.errors import NumericError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block, partition
from cria_dist.pipeline import Context, prune
from cria_dist.pool import LocalPool
from cria_dist.records import Site
from cria_dist.stages import schedule
from cria_dist.stages.estimate import bytes_of_run
from cria_dist.stages.export_activations import Choice, export_activations
from cria_dist.stages.footprint import Workload
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.stages.sample import TokenSample
from cria_dist.stages.schedule import Kind
from cria_dist.store.places import recorded
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

LAYERS, SEQUENCES, LENGTH = 4, 10, 16
SITES = [Site(layer, part) for layer in range(LAYERS) for part in ("mlp", "block")]
SAMPLE = TokenSample(5, SEQUENCES, LENGTH, 57)
METHOD = {"name": "block_influence"}


@pytest.fixture(scope="module")
def deep(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=LAYERS)


@pytest.fixture
def task(deep: Path, tmp_path: Path) -> RecordTask:
    """10 sequences in shards of 4, 4 and 2, batches of 3 and a rest."""
    tokens_ST = np.random.default_rng(0).integers(0, 256, (SEQUENCES, LENGTH)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens_ST)
    return RecordTask(
        recording=Recording(LocalStorage(tmp_path / "recording"), "digest"),
        model_dir=deep,
        tokens_path=tmp_path / "tokens.npy",
        numerics=checkpoint.Numerics(),
        signal_dtype="float32",
        shard_sequences=4,
        batch_sequences=3,
        sampled_tokens=57,
        seed=5,
        hidden=True,
    )


def carry_out(task: RecordTask, blocks: int = 1) -> Recording:
    recorder = Recorder(task)
    for block in partition(LAYERS, blocks):
        for shard in range(3):
            recorder(ShardWork(shard, block))
    task.recording.write_manifest(SITES if task.hidden else SITES[::2], 3)
    return task.recording


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_states_are_those_of_the_sampled_tokens(
    model_type: str, task: RecordTask, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_model(tmp_path / "model", model_type, num_hidden_layers=LAYERS)
    recording = carry_out(replace(task, model_dir=directory))
    model = checkpoint.load_model(directory, checkpoint.Numerics())
    unnormed: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: unnormed.append(arguments[0]))
    with torch.inference_mode():
        tokens = torch.from_numpy(np.load(task.tokens_path)).long()
        states = list(model(input_ids=tokens, output_hidden_states=True).hidden_states)
    rows = SAMPLE.rows(range(SEQUENCES))
    found = [recording.signals(Site(0, "block"))["input"]]
    found += [recording.signals(Site(layer, "block"))["output"] for layer in range(LAYERS)]
    expected = [state.flatten(0, 1)[rows].T.numpy() for state in (*states[:LAYERS], unnormed[0])]
    for theirs, ours in zip(expected, found, strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[-1], states[-1].flatten(0, 1)[rows].T.numpy(), atol=0.1), "the last state is normed"
    assert all("input" not in recording.signals(Site(layer, "block")) for layer in range(1, LAYERS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_change_no_byte(dtype: str, task: RecordTask, tmp_path: Path) -> None:
    task = replace(task, numerics=checkpoint.Numerics(dtype), signal_dtype=dtype)
    carry_out(task)
    carry_out(replace(task, recording=Recording(LocalStorage(tmp_path / "parts"), "digest")), blocks=3)
    whole, parts = contents(tmp_path / "recording"), contents(tmp_path / "parts")
    assert whole == {name: content for name, content in parts.items() if not name.startswith("boundaries")}


def test_what_is_recorded_of_the_neurons_does_not_change(task: RecordTask, tmp_path: Path) -> None:
    carry_out(task)
    carry_out(replace(task, hidden=False, recording=Recording(LocalStorage(tmp_path / "without"), "digest")))
    both, neurons = contents(tmp_path / "recording"), contents(tmp_path / "without")
    assert not [name for name in neurons if ".block" in name]
    neurons.pop("manifest.json")
    assert neurons.items() < both.items()


def test_float16_overflow_is_an_error(task: RecordTask, deep: Path, tmp_path: Path) -> None:
    model = tmp_path / "large"
    model.mkdir()
    for path in deep.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(deep / checkpoint.WEIGHTS)
    tensors["model.embed_tokens.weight"] *= 1e6
    save_file(tensors, model / checkpoint.WEIGHTS, metadata={"format": "pt"})
    message = r"layer-000\.block, shard 0: \d+ values of signal 'output' do not fit torch.float16; set record.dtype"
    with pytest.raises(NumericError, match=message.replace("'output'", "'(in|out)put'")):
        carry_out(replace(task, model_dir=model, signal_dtype="float16"))


def test_hidden_states_are_exported_where_they_are_meant(
    run_config: RunConfigMaker, make_context: MakeContext, deep: Path, tmp_path: Path
) -> None:
    context = make_context(run_config(tmp_path, model={"path": str(deep)}, method=METHOD), until="record")
    prune(context, until="record")
    cases = [
        (Choice(), SITES),
        (Choice(signal="output"), SITES[::2]),
        (Choice(signal="gate"), SITES[::2]),
        (Choice(site="layer-000.block", signal="input"), [Site(0, "block")]),
    ]
    for number, (choice, sites) in enumerate(cases):
        written = export_activations(context.job.folder, tmp_path / f"export-{number}", choice)
        assert sorted(path.stem for path in written) == sorted(site.key for site in sites)
    recording = recorded(context.job.folder / "round-00")
    exported = parquet.read_table(tmp_path / "export-0" / "layer-000.block.parquet")
    for name in ("input", "output"):
        stored_NT = recording.signals(Site(0, "block"))[name]
        assert np.array_equal(np.array(exported[name].to_pylist(), dtype=np.float32).T, stored_NT)


def test_a_damaged_file_is_recorded_again(task: RecordTask) -> None:
    recording = carry_out(task)
    assert recording.is_complete()
    (name,) = [name for name in recording.storage.sizes("activations/layer-002.block") if "shard-00001" in name]
    Path(recording.storage.where(name)).write_bytes(b"half")
    assert not recording.is_complete()
    sites = [Site(layer, part) for layer in range(LAYERS) for part in ("mlp", "block")]
    sweep = schedule.Schedule("sweep", partition(LAYERS, LAYERS), "")
    left = schedule.pending(sweep, 3, recording.committed(), [], sites)
    assert [str(work) for work in left if work.block.first == 2] == ["shard 1, layers 2-2"]


def test_sizes_by_arithmetic(run_config: RunConfigMaker, make_context: MakeContext, deep: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"path": str(deep)}}
    plain, with_layers = (run_config(tmp_path, **changes, method=one) for one in ({"name": "random"}, METHOD))
    assert plain.records_hidden is False
    config = checkpoint.read_config(deep)
    job = make_context(with_layers, until="record").job
    sizes = [bytes_of_run(one, config, job.family, job.dense_parameters)["signals"] for one in (plain, with_layers)]
    assert sizes[1] - sizes[0] == 4 * 200 * 32 * (LAYERS + 1)
    works = Workload(plain, config), Workload(with_layers, config)
    for block, states in ((Block(0, LAYERS, LAYERS), LAYERS + 1), (Block(1, 3, LAYERS), 2)):
        before, after = (work.footprint(block).data for work in works)
        assert after - before == states * works[0].sampled * 32 * 4


class TwoWorkers(LocalPool):
    """Says it has two workers."""

    workers = 2


def test_a_schedule_changes_no_byte(
    run_config: RunConfigMaker, make_context: MakeContext, deep: Path, tmp_path: Path
) -> None:
    cases: list[tuple[Kind, int]] = [("replicate", 1), ("pipeline", 2), ("sweep", 3)]
    found: list[dict[str, bytes]] = []
    for kind, blocks in cases:
        settings: dict[str, Any] = {"model": {"path": str(deep)}, "method": METHOD}
        config = run_config(tmp_path / kind, **settings, record={"schedule": kind})
        need = schedule.peak(Workload(config, checkpoint.read_config(deep)), partition(LAYERS, blocks), 1).total
        config = run_config(tmp_path / kind, **settings, record={"schedule": kind, "memory_gb": (need + 10) / 1e9})
        context = make_context(config, TwoWorkers(), until="record")
        prune(context, until="record")
        found.append(contents(context.job.folder / "round-00"))
        assert recorded(context.job.folder / "round-00").is_complete()
    assert found[0] == found[1] == found[2]
    assert len([name for name in found[0] if name.startswith("activations/") and ".block/" in name]) == 3 * LAYERS
