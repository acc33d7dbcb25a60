"""Recording: what is stored is what the model computed, however the work was cut."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from cria_dist.errors import NumericError
from cria_dist.models import checkpoint
from cria_dist.records import Site
from cria_dist.stages.record import Recorder, RecordTask, sampled_positions
from cria_dist.store.recording import Recording

SEQUENCES, LENGTH = 10, 16
SITES = [Site(0), Site(1)]


@pytest.fixture
def task(pico: Path, tmp_path: Path) -> RecordTask:
    """10 sequences in shards of 4, 4 and 2, batches of 3 and a rest."""
    tokens_ST = np.random.default_rng(0).integers(0, 256, (SEQUENCES, LENGTH)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens_ST)
    return RecordTask(
        recording=Recording(tmp_path / "recording", "digest"),
        model_dir=pico,
        tokens_path=tmp_path / "tokens.npy",
        numerics=checkpoint.Numerics(),
        signal_dtype="float32",
        shard_sequences=4,
        batch_sequences=3,
        sampled_tokens=57,
        seed=5,
    )


def recorded(task: RecordTask, order: tuple[int, ...] = (0, 1, 2)) -> Recording:
    recorder = Recorder(task)
    for shard in order:
        recorder(shard)
    task.recording.write_manifest(len(order))
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
    rows = [
        sequence * LENGTH + position
        for sequence in range(SEQUENCES)
        for position in sampled_positions(5, sequence, SEQUENCES, 57, LENGTH)
    ]
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
        table = parquet.read_table(recording.signal_path(SITES[0], shard))
        found += list(zip(table["sequence"].to_pylist(), table["position"].to_pylist(), strict=True))
    expected = [(s, int(p)) for s in range(SEQUENCES) for p in sampled_positions(5, s, SEQUENCES, 57, LENGTH)]
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
    whole = recorded(replace(task, recording=Recording(tmp_path / "whole", "x"), shard_sequences=SEQUENCES), (0,))
    for site in SITES:
        one, other = parts.moments(site), whole.moments(site)
        assert one.count == other.count
        assert np.allclose(one.total_N, other.total_N, rtol=1e-5, atol=1e-5)
        assert np.allclose(one.gram_NN, other.gram_NN, rtol=1e-5, atol=1e-5)


def test_the_batch_size_changes_nothing_but_rounding(task: RecordTask, tmp_path: Path) -> None:
    single = recorded(replace(task, recording=Recording(tmp_path / "single", "x"), batch_sequences=1))
    batched = recorded(task)
    for name, signal_NM in batched.signals(SITES[0]).items():
        assert np.allclose(signal_NM, single.signals(SITES[0])[name], rtol=1e-4, atol=1e-5)
    assert np.allclose(batched.moments(SITES[0]).gram_NN, single.moments(SITES[0]).gram_NN, rtol=1e-4, atol=1e-5)


def test_who_records_which_shard_when_changes_no_byte(task: RecordTask, tmp_path: Path) -> None:
    """One worker in order; one in another order; a worker per shard."""
    recordings = [recorded(task)]
    recordings.append(recorded(replace(task, recording=Recording(tmp_path / "b", "digest")), (2, 0, 1)))
    alone = replace(task, recording=Recording(tmp_path / "c", "digest"))
    for shard in (1, 2, 0):
        Recorder(alone)(shard)
    alone.recording.write_manifest(3)
    recordings.append(alone.recording)
    assert len({recording.manifest_path.read_bytes() for recording in recordings}) == 1
    assert len({recording.signal_path(SITES[0], 2).read_bytes() for recording in recordings}) == 1


def test_a_shard_reports_what_it_did(task: RecordTask) -> None:
    recorder = Recorder(task)
    full, rest = recorder(0), recorder(2)
    assert (full.shard, full.tokens, rest.tokens) == (0, 4 * LENGTH, 2 * LENGTH)
    written = [task.recording.signal_path(site, 0).stat().st_size for site in SITES]
    written += [task.recording.moments_path(site, 0).stat().st_size for site in SITES]
    assert full.bytes_written == sum(written)
    assert task.recording.is_committed(0)
    assert not task.recording.is_committed(1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_signals_are_rounded_once(dtype: str, task: RecordTask) -> None:
    recording = recorded(replace(task, signal_dtype=dtype))
    rows = [s * LENGTH + p for s in range(SEQUENCES) for p in sampled_positions(5, s, SEQUENCES, 57, LENGTH)]
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
        Recorder(replace(task, signal_dtype="float16"))(2)
    assert not task.recording.is_committed(2)
    Recorder(replace(task, signal_dtype="bfloat16"))(2)
    assert task.recording.is_committed(2)


def test_not_a_number_is_an_error(task: RecordTask, pico: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.gate_proj.weight"][7, 3] = torch.nan

    spoilt = damaged_model(pico, tmp_path / "spoilt", spoil)
    with pytest.raises(NumericError, match=r"layer-000\.mlp, shard 1: \d+ moments are NaN or infinite"):
        Recorder(replace(task, model_dir=spoilt))(1)
    assert not task.recording.is_committed(1)


@pytest.mark.parametrize(("tokens", "length"), [(57, 16), (10, 16), (3, 16), (150, 16), (64, 512)])
def test_sampled_positions(tokens: int, length: int) -> None:
    """Stratified: every sequence gives its share; the first position, an attention sink, is never taken."""
    taken = [sampled_positions(0, sequence, 10, tokens, length) for sequence in range(10)]
    assert sum(map(len, taken)) == tokens
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    for positions in taken:
        assert len(set(positions.tolist())) == len(positions)
        assert sorted(positions) == positions.tolist()
        assert positions.size == 0 or (positions[0] >= 1 and positions[-1] < length)
    again = [sampled_positions(0, sequence, 10, tokens, length) for sequence in range(10)]
    assert all(np.array_equal(one, other) for one, other in zip(taken, again, strict=True))


def test_samples_differ_by_seed_and_sequence() -> None:
    def sample(seed: int, sequence: int) -> tuple[int, ...]:
        return tuple(sampled_positions(seed, sequence, 10, 100, 512).tolist())

    assert len({sample(0, 0), sample(1, 0), sample(0, 1), sample(1, 1)}) == 4


def test_every_position_but_the_first_can_be_sampled() -> None:
    everything = sampled_positions(0, 0, 1, 15, 16)
    assert everything.tolist() == list(range(1, 16))
