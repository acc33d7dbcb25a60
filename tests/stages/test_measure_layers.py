"""Layers measured shard by shard: the sums are those of the sequences, whoever takes which shard."""

import functools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cria_dist.config import RunConfig
from cria_dist.errors import DataError
from cria_dist.methods import BlockInfluence, MPruner
from cria_dist.methods.layers import LayerMethod
from cria_dist.pipeline import Context, prune
from cria_dist.records import Site
from cria_dist.stages.check_layers import measured_sequences
from cria_dist.stages.measure_layers import LayerMeter, MeasureTask, added_up
from cria_dist.store.layer_sums import WHOLE, need_sums, read_sums, shard_name
from cria_dist.store.places import recorded
from cria_dist.store.recording import Recording

LAYERS, SEQUENCES = 4, 12


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def recording(
    request: pytest.FixtureRequest,
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Context],
    make_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Recording, Path]:
    """Hidden states of 12 sequences in 3 shards, and the model they are of."""
    folder = tmp_path_factory.mktemp("measured")
    model = make_model(folder / "model", num_hidden_layers=LAYERS)
    method = {"name": "block_influence"}
    config = run_config(folder, model={"path": str(model)}, method=method, record={"dtype": request.param})
    context = make_context(config, until="record")
    prune(context, until="record")
    return recorded(context.job.folder / "round-00"), model


def task_of(recording: tuple[Recording, Path], folder: Path, method: LayerMethod, sequences: int) -> MeasureTask:
    return MeasureTask(recording[0], recording[1], method, folder, "digest", sequences)


def by_sequence(recording: Recording, method: LayerMethod, sequences: int) -> np.ndarray:
    """The same sums from whole signals, sequence after sequence."""
    states = [recording.signals(Site(0, "block"))["input"].T]
    states += [recording.signals(Site(layer, "block"))["output"].T for layer in range(LAYERS)]
    stored = [recording.hidden(Site(0, "block"), shard) for shard in range(3)]
    sequence_T = np.concatenate([one.tokens["sequence"] for one in stored])
    return sum(method.measure([state[sequence_T == index] for state in states]) for index in range(sequences))


@pytest.mark.parametrize("method", [BlockInfluence(), MPruner(), MPruner(stop="loss", held_out=0.4)], ids=repr)
def test_sums_are_those_of_the_sequences_that_are_not_held_out(
    method: LayerMethod, recording: tuple[Recording, Path], tmp_path: Path
) -> None:
    sequences = measured_sequences(method, SEQUENCES)
    assert sequences == (7 if method.held_out_share else 12)
    task = task_of(recording, tmp_path, method, sequences)
    meter = LayerMeter(task)
    tokens = [meter(shard) for shard in (2, 0, 1)]
    assert sum(tokens) == sum(200 // 12 + (index < 200 % 12) for index in range(sequences))
    total = added_up([need_sums(tmp_path, shard_name(shard), "digest") for shard in range(3)])
    np.testing.assert_allclose(total, by_sequence(recording[0], method, sequences), rtol=1e-12)


def test_another_worker_writes_the_same_bytes(recording: tuple[Recording, Path], tmp_path: Path) -> None:
    make = functools.partial(LayerMeter, task_of(recording, tmp_path / "one", MPruner(), 12))
    make()(1)
    again = functools.partial(LayerMeter, replace(make.args[0], folder=tmp_path / "two"))
    pickle.loads(pickle.dumps(again))()(1)
    files = [path / "layers" / "shard-00001.npz" for path in (tmp_path / "one", tmp_path / "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_damage_is_found(recording: tuple[Recording, Path], tmp_path: Path) -> None:
    LayerMeter(task_of(recording, tmp_path, MPruner(), 12))(0)
    assert read_sums(tmp_path, shard_name(0), "another digest") is None
    assert read_sums(tmp_path, WHOLE, "digest") is None
    path = tmp_path / "layers" / "shard-00000.npz"
    path.write_bytes(path.read_bytes()[:-9])
    assert read_sums(tmp_path, shard_name(0), "digest") is None
    with pytest.raises(DataError, match=r"shard-00000\.npz is missing or damaged; run the same command again"):
        need_sums(tmp_path, shard_name(0), "digest")
