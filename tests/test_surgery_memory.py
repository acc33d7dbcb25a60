"""A sharded checkpoint in the shape of Llama-7B, scaled down: surgery holds a part of a shard, not the model."""

from pathlib import Path

import pytest

from jobs.benchmarks import surgery
from jobs.benchmarks.surgery import QUICK, QUICK_SHARD_BYTES, run_process, write_random


@pytest.mark.slow
def test_surgery_needs_less_than_one_and_a_half_shards(tmp_path: Path) -> None:
    shards = write_random(tmp_path / "source", QUICK, QUICK_SHARD_BYTES)
    assert len(shards) == 3
    taken = run_process("prune", tmp_path / "source", tmp_path / "target")
    assert taken["peak"] - taken["start"] < 1.5 * max(shards)


def test_a_full_disk_takes_layers_away() -> None:
    spare, whole = surgery.SPARE_BYTES, 2 * 13_476_831_232
    assert surgery._fitting(surgery.SHAPE, spare + whole)["num_hidden_layers"] == 32
    assert surgery._fitting(surgery.SHAPE, spare + whole // 2)["num_hidden_layers"] == 15
    assert surgery._fitting(surgery.SHAPE, 0)["num_hidden_layers"] == 1
