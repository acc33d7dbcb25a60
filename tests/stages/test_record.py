"""Recording: what is stored is what the model computed, however the work was cut."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from cria_dist.errors import ConfigError, DataError, NumericError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block, BlockModel, partition
from cria_dist.records import Site
from cria_dist.stages import boundary
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.stages.sample import TokenSample
from cria_dist.store.recording import MANIFEST, Recording
from cria_dist.store.storage import LocalStorage

SEQUENCES, LENGTH = 10, 16
SITES = [Site(0), Site(1)]
(WHOLE,) = partition(2, 1)
HALVES = partition(2, 2)
SAMPLE = TokenSample(5, SEQUENCES, LENGTH, 57)


@pytest.fixture
def task(pico: Path, tmp_path: Path) -> RecordTask:
    """10 sequences in shards of 4, 4 and 2, batches of 3 and a rest."""
    tokens_ST = np.random.default_rng(0).integers(0, 256, (SEQUENCES, LENGTH)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens_ST)
    return RecordTask(
        recording=stored_in(tmp_path / "recording"),
        model_dir=pico,
        tokens_path=tmp_path / "tokens.npy",
        numerics=checkpoint.Numerics(),
        signal_dtype="float32",
        shard_sequences=4,
        batch_sequences=3,
        sampled_tokens=57,
        seed=5,
    )


def stored_in(folder: Path) -> Recording:
    return Recording(LocalStorage(folder), "digest")


def file_of(recording: Recording, folder: str, site: Site, shard: int) -> Path:
    (name,) = [name for name in recording.storage.sizes(f"{folder}/{site.key}") if f"/shard-{shard:05d}." in name]
    return Path(recording.storage.where(name))


def manifest_of(recording: Recording) -> bytes:
    return recording.storage.read(MANIFEST)


def committed_shards(recording: Recording) -> set[int]:
    """Shards of which every site is committed."""
    sites = recording.committed()
    return {shard for _, shard in sites if all((site, shard) in sites for site in SITES)}


def recorded(task: RecordTask, order: tuple[int, ...] = (0, 1, 2)) -> Recording:
    recorder = Recorder(task)
    for shard in order:
        recorder(ShardWork(shard, WHOLE))
    task.recording.write_manifest(SITES, len(order))
    return task.recording


def observed(task: RecordTask, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """The three signals of layer 1 for every token, [tokens, units]; computed by hand from the MLP's input."""
    model = checkpoint.load_model(task.model_dir, task.numerics)
    mlp = model.model.layers[1].mlp
    inputs: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    tokens_ST = torch.from_numpy(np.load(task.tokens_path)).long()
    with torch.inference_mode():
        model(input_ids=tokens_ST)
        handle.remove()
        hidden_TD = inputs[0].flatten(0, 1)
        gate_TN = hidden_TD @ mlp.gate_proj.weight.T
        up_TN = hidden_TD @ mlp.up_proj.weight.T
        output_TN = torch.nn.functional.silu(gate_TN) * up_TN
    signals = {"gate": gate_TN, "up": up_TN, "output": output_TN}
    return {name: signal.to(dtype).float().numpy() for name, signal in signals.items()}


def test_signals_are_those_of_the_sampled_tokens(task: RecordTask) -> None:
    recording = recorded(task)
    rows = SAMPLE.rows(range(SEQUENCES))
    assert len(rows) == 57
    stored, expected = recording.signals(SITES[1]), observed(task)
    assert sorted(stored) == sorted(expected)
    for name, signal_TN in expected.items():
        assert stored[name].shape == (48, 57)
        assert np.allclose(stored[name], signal_TN[rows].T, rtol=1e-5, atol=1e-6), name


def test_the_files_say_which_token_a_row_is(task: RecordTask) -> None:
    recording = recorded(task)
    found = []
    for shard in range(3):
        table = parquet.read_table(file_of(recording, "activations", SITES[0], shard))
        found += list(zip(table["sequence"].to_pylist(), table["position"].to_pylist(), strict=True))
    expected = [(sequence, int(position)) for sequence in range(SEQUENCES) for position in SAMPLE.positions(sequence)]
    assert found == expected


def test_moments_are_those_of_all_tokens(task: RecordTask) -> None:
    moments = recorded(task).moments(SITES[1])
    output_TN = observed(task)["output"].astype(np.float64)
    assert moments.count == SEQUENCES * LENGTH
    assert np.allclose(moments.total_N, output_TN.sum(axis=0), rtol=1e-5, atol=1e-5)
    assert np.allclose(moments.gram_NN, output_TN.T @ output_TN, rtol=1e-5, atol=1e-5)
    assert np.allclose(moments.std_N, output_TN.std(axis=0), rtol=1e-3, atol=1e-5)


def test_moments_over_shards_are_moments_over_the_whole(task: RecordTask, tmp_path: Path) -> None:
    parts = recorded(task)
    whole = recorded(replace(task, recording=stored_in(tmp_path / "whole"), shard_sequences=SEQUENCES), (0,))
    for site in SITES:
        one, other = parts.moments(site), whole.moments(site)
        assert one.count == other.count
        assert np.allclose(one.total_N, other.total_N, rtol=1e-5, atol=1e-5)
        assert np.allclose(one.gram_NN, other.gram_NN, rtol=1e-5, atol=1e-5)


def test_the_batch_size_changes_nothing_but_rounding(task: RecordTask, tmp_path: Path) -> None:
    single = recorded(replace(task, recording=stored_in(tmp_path / "single"), batch_sequences=1))
    batched = recorded(task)
    for name, signal_NM in batched.signals(SITES[0]).items():
        assert np.allclose(signal_NM, single.signals(SITES[0])[name], rtol=1e-4, atol=1e-5)
    assert np.allclose(batched.moments(SITES[0]).gram_NN, single.moments(SITES[0]).gram_NN, rtol=1e-4, atol=1e-5)


def test_who_records_which_shard_when_changes_no_byte(task: RecordTask, tmp_path: Path) -> None:
    """One worker in order; one in another order; a worker per shard."""
    recordings = [recorded(task)]
    recordings.append(recorded(replace(task, recording=stored_in(tmp_path / "b")), (2, 0, 1)))
    alone = replace(task, recording=stored_in(tmp_path / "c"))
    for shard in (1, 2, 0):
        Recorder(alone)(ShardWork(shard, WHOLE))
    alone.recording.write_manifest(SITES, 3)
    recordings.append(alone.recording)
    assert len({manifest_of(recording) for recording in recordings}) == 1
    assert len({file_of(recording, "activations", SITES[0], 2).read_bytes() for recording in recordings}) == 1


def test_a_shard_reports_what_it_did(task: RecordTask) -> None:
    recorder = Recorder(task)
    full, rest = recorder(ShardWork(0, WHOLE)), recorder(ShardWork(2, WHOLE))
    assert (full.tokens, rest.tokens) == (4 * LENGTH, 2 * LENGTH)
    files = [file_of(task.recording, folder, site, 0) for folder in ("activations", "moments") for site in SITES]
    assert full.bytes_written == sum(path.stat().st_size for path in files)
    assert task.recording.committed() == {(site, shard) for site in SITES for shard in (0, 2)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_signals_are_rounded_once(dtype: str, task: RecordTask) -> None:
    recording = recorded(replace(task, signal_dtype=dtype))
    rows = SAMPLE.rows(range(SEQUENCES))
    expected = observed(task, getattr(torch, dtype))["gate"][rows].T
    found = recording.signals(SITES[1])["gate"]
    step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    assert np.allclose(found, expected, rtol=step, atol=1e-5)
    assert (found == expected).mean() > 0.98
    rounded = torch.from_numpy(found).to(getattr(torch, dtype)).float().numpy()
    assert np.array_equal(rounded, found)


def test_a_bfloat16_model_is_recorded(task: RecordTask) -> None:
    numerics = checkpoint.Numerics("bfloat16")
    recording = recorded(replace(task, signal_dtype="bfloat16", numerics=numerics))
    assert np.isfinite(recording.moments(SITES[0]).gram_NN).all()
    assert np.abs(recording.signals(SITES[0])["output"]).max() > 0


def test_fewer_samples_than_sequences(task: RecordTask) -> None:
    recording = recorded(replace(task, sampled_tokens=3))
    assert recording.signals(SITES[0])["gate"].shape == (48, 3)
    assert recording.moments(SITES[0]).count == SEQUENCES * LENGTH


def damaged_model(pico: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(pico, folder)
    tensors = load_file(folder / checkpoint.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    return folder


def test_float16_overflow_is_an_error(task: RecordTask, pico: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e6

    loud = damaged_model(pico, tmp_path / "loud", enlarge)
    task = replace(task, model_dir=loud)
    with pytest.raises(NumericError, match=r"layer-001\.mlp, shard 2: \d+ values of signal 'up' .*record\.dtype"):
        Recorder(replace(task, signal_dtype="float16"))(ShardWork(2, WHOLE))
    assert committed_shards(task.recording) == set()
    Recorder(replace(task, signal_dtype="bfloat16"))(ShardWork(2, WHOLE))
    assert committed_shards(task.recording) == {2}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tensor", ["self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("blocks", [(WHOLE,), HALVES], ids=["whole", "halves"])
def test_not_a_number_is_an_error_of_its_layer(
    blocks: tuple[Block, ...], tensor: str, layer: int, task: RecordTask, pico: Path, tmp_path: Path
) -> None:
    """Wherever in the layer it appears, and before the next block is handed it."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.{layer}.{tensor}.weight"][7, 3] = torch.nan

    spoilt = damaged_model(pico, tmp_path / "spoilt", spoil)
    recorder = Recorder(replace(task, model_dir=spoilt))
    broken = rf"layer-00{layer}\.mlp, shard 1: hidden states of {4 * LENGTH} tokens are NaN"
    if layer == 1 and blocks == HALVES:
        recorder(ShardWork(1, blocks[0]))
    with pytest.raises(NumericError, match=broken):
        recorder(ShardWork(1, blocks[layer % len(blocks)]))
    assert committed_shards(task.recording) == set()
    assert {site.layer for site, _ in task.recording.committed()} <= set(range(layer))
    assert (HALVES[1].first, 1) not in boundary.stored(task.recording) or layer == 1


def test_an_overflowing_sum_of_squares_is_an_error(task: RecordTask, pico: Path, tmp_path: Path) -> None:
    """The signals are finite and so is what the layer hands on (its output weights undo the scale)."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5] *= 1e20
        tensors["model.layers.1.mlp.down_proj.weight"][:, 5] *= 1e-20

    loud = damaged_model(pico, tmp_path / "loud", enlarge)
    with pytest.raises(NumericError, match=r"layer-001\.mlp, shard 0: 1 moments are NaN or infinite"):
        Recorder(replace(task, model_dir=loud))(ShardWork(0, WHOLE))


# memory


def forgetful(monkeypatch: pytest.MonkeyPatch, largest: int, calls: list[int], spare: int = 0) -> None:
    """Forward passes of more than ``largest`` sequences run out of GPU memory, after ``spare`` that did not."""
    run = BlockModel.__call__

    def limited(self: BlockModel, values: torch.Tensor) -> torch.Tensor:
        calls.append(len(values))
        result = run(self, values)
        if len(values) > largest and len(calls) > spare:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(BlockModel, "__call__", limited)


def test_out_of_memory_halves_the_batch_once_and_says_so(
    task: RecordTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in the shard's second batch: what was observed of the first one is forgotten."""
    task = replace(task, batch_sequences=2)
    small = recorded(replace(task, recording=stored_in(tmp_path / "small"), batch_sequences=1))
    calls: list[int] = []
    forgetful(monkeypatch, 1, calls, spare=1)
    with caplog.at_level(logging.WARNING):
        recording = recorded(task)
    assert calls == [2, 2, *([1] * SEQUENCES)]
    assert [record.getMessage() for record in caplog.records] == [
        "shard 0, layers 0-1: out of GPU memory, record.batch_sequences 2 -> 1"
    ]
    assert manifest_of(recording) == manifest_of(small)


@pytest.mark.parametrize(("batch", "tried"), [(4, [4, 2]), (1, [1])])
def test_out_of_memory_again_is_an_error_with_a_remedy(
    batch: int, tried: list[int], task: RecordTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forgetful(monkeypatch, 0, calls)
    with pytest.raises(
        ConfigError, match=rf"shard 0, layers 0-1: .* batches of {tried[-1]} \(record\.batch_sequences={batch}"
    ):
        Recorder(replace(task, batch_sequences=batch))(ShardWork(0, WHOLE))
    assert calls == tried
    assert committed_shards(task.recording) == set()


def test_a_batch_larger_than_the_shard(task: RecordTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the shard that runs, and half of it when memory does not suffice."""
    calls: list[int] = []
    forgetful(monkeypatch, 2, calls)
    recorded(replace(task, batch_sequences=100))
    assert calls == [4, 2, 2, 2, 2, 2]


# blocks


def recorded_in_halves(task: RecordTask, shards: tuple[int, ...] = (0, 1, 2)) -> Recording:
    recorder = Recorder(task)
    for block in HALVES:
        for shard in shards:
            recorder(ShardWork(shard, block))
    task.recording.write_manifest(SITES, 3)
    return task.recording


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_change_no_byte(dtype: str, task: RecordTask, tmp_path: Path) -> None:
    task = replace(task, numerics=checkpoint.Numerics(dtype), signal_dtype=dtype)
    halves = recorded_in_halves(replace(task, recording=stored_in(tmp_path / "halves")))
    assert manifest_of(halves) == manifest_of(recorded(task))


def test_an_item_can_be_done_twice(task: RecordTask, tmp_path: Path) -> None:
    """A worker that dies after its work and before its answer leaves all a second one needs."""
    clean = recorded_in_halves(replace(task, recording=stored_in(tmp_path / "clean")))
    for block in HALVES:
        for shard in range(3):
            Recorder(task)(ShardWork(shard, block))
            Recorder(task)(ShardWork(shard, block))
    task.recording.write_manifest(SITES, 3)
    assert manifest_of(task.recording) == manifest_of(clean)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_between_blocks_are_as_computed(dtype: str, task: RecordTask) -> None:
    Recorder(replace(task, numerics=checkpoint.Numerics(dtype)))(ShardWork(0, HALVES[0]))
    assert boundary.stored(task.recording) == {(1, 0)}
    hidden_STD = boundary.read(task.recording, 1, 0)
    assert hidden_STD.shape == (4, LENGTH, 32)
    assert hidden_STD.dtype == getattr(torch, dtype)
    model = checkpoint.load_model(task.model_dir, checkpoint.Numerics(dtype))
    tokens_ST = torch.from_numpy(np.load(task.tokens_path)[:4]).long()
    with torch.inference_mode():
        expected = model(input_ids=tokens_ST, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(hidden_STD.float(), expected.float(), rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-5)


def damaged_boundary(recording: Recording) -> Path:
    (path,) = Path(recording.storage.where("boundaries")).rglob("shard-00001*")
    return path


@pytest.mark.parametrize("damage", ["a bit", "half", "nothing left"])
def test_a_damaged_boundary_names_itself_and_is_mended(damage: str, task: RecordTask, tmp_path: Path) -> None:
    clean = recorded(replace(task, recording=stored_in(tmp_path / "clean")))
    recorder = Recorder(task)
    for shard in range(3):
        recorder(ShardWork(shard, HALVES[0]))
    path = damaged_boundary(task.recording)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"a bit": bytes(content), "half": content[: len(content) // 2], "nothing left": b""}[damage])
    with pytest.raises(DataError, match=rf"{path} is damaged .*delete it"):
        recorder(ShardWork(1, HALVES[1]))
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} cannot be read"):
        recorder(ShardWork(1, HALVES[1]))
    recorder(ShardWork(1, HALVES[0]))
    for shard in range(3):
        recorder(ShardWork(shard, HALVES[1]))
    task.recording.write_manifest(SITES, 3)
    assert manifest_of(task.recording) == manifest_of(clean)


def test_hidden_states_of_another_run_are_not_ours(task: RecordTask) -> None:
    Recorder(replace(task, recording=replace(task.recording, digest="other tokens")))(ShardWork(0, HALVES[0]))
    assert boundary.stored(task.recording) == set()
    with pytest.raises(DataError, match="cannot be read"):
        Recorder(task)(ShardWork(0, HALVES[1]))


# tokens


def test_tokens_that_end_before_the_shard_are_an_error(task: RecordTask) -> None:
    with pytest.raises(DataError, match=r"tokens\.npy has 10 sequences, shard 3, layers 0-1 begins at number 12"):
        Recorder(task)(ShardWork(3, WHOLE))
    assert not task.recording.storage.sizes("")


def test_an_error_of_the_store_ends_the_shard(task: RecordTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by another thread, told by this one; nothing is committed after it."""
    write_with = LocalStorage.write_with

    def full(self: LocalStorage, name: str, fill: Callable[[Any], object]) -> dict[str, object]:
        if name.startswith(f"moments/{SITES[0].key}"):
            raise DataError(f"{self.where(name)} cannot be written (no space left)")
        return write_with(self, name, fill)

    monkeypatch.setattr(LocalStorage, "write_with", full)
    with pytest.raises(DataError, match=r"moments/layer-000.* cannot be written"):
        Recorder(task)(ShardWork(0, WHOLE))
    assert not task.recording.storage.sizes("commits")
