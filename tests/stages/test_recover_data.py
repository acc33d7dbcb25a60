"""The order of a recovery: every sequence once an epoch, the same global batches for any number of workers."""

import numpy as np
import pytest
import torch

from cria_dist.config import RecoverConfig
from cria_dist.stages.recover_data import sequence_order, training_sequences


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_the_same_global_batches(world: int) -> None:
    config = RecoverConfig(steps=13, workers=world, batch_sequences=4)
    order = sequence_order(10, config, seed=3)
    alone = sequence_order(10, RecoverConfig(steps=13, workers=1, batch_sequences=4), seed=3)
    for step, batch in enumerate(order):
        parts = [batch[rank::world] for rank in range(world)]
        assert {len(part) for part in parts} == {4 // world}
        assert sorted(np.concatenate(parts)) == sorted(alone[step])


def test_every_epoch_sees_every_sequence_once() -> None:
    order = np.concatenate(sequence_order(10, RecoverConfig(steps=6, workers=1, batch_sequences=5), seed=0))
    epochs = np.split(order, 3)
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert not np.array_equal(epochs[0], epochs[1])


def test_training_sequences_cut_the_calibration_stream() -> None:
    tokens_ST = np.arange(70, dtype=np.int32).reshape(7, 10)
    sequences = training_sequences(tokens_ST, 16)
    assert sequences.dtype == torch.int64
    assert torch.equal(sequences, torch.arange(64).reshape(4, 16))
    assert training_sequences(tokens_ST, 500).shape == (1, 70)
