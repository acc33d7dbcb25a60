"""Which tokens are sampled."""

import numpy as np
import pytest

from cria_dist.stages.sample import SentenceSample, TokenSample


@pytest.mark.parametrize(("tokens", "length"), [(57, 16), (10, 16), (3, 16), (150, 16), (64, 512)])
def test_sampled_positions(tokens: int, length: int) -> None:
    """Stratified: every sequence gives its share; the first position, an attention sink, is never taken."""
    taken = [TokenSample(0, 10, length, tokens).positions(sequence) for sequence in range(10)]
    assert sum(map(len, taken)) == tokens
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    for positions in taken:
        assert len(set(positions.tolist())) == len(positions)
        assert sorted(positions) == positions.tolist()
        assert positions.size == 0 or (positions[0] >= 1 and positions[-1] < length)
    again = [TokenSample(0, 10, length, tokens).positions(sequence) for sequence in range(10)]
    assert all(np.array_equal(one, other) for one, other in zip(taken, again, strict=True))


def test_samples_differ_by_seed_and_sequence() -> None:
    def sample(seed: int, sequence: int) -> tuple[int, ...]:
        return tuple(TokenSample(seed, 10, 512, 100).positions(sequence).tolist())

    assert len({sample(0, 0), sample(1, 0), sample(0, 1), sample(1, 1)}) == 4


def test_every_position_but_the_first_can_be_sampled() -> None:
    everything = TokenSample(0, 1, 16, 15).positions(0)
    assert everything.tolist() == list(range(1, 16))


def test_rows_and_origin_name_the_same_tokens() -> None:
    """Also from the middle of the set on: rows count from the first sequence given."""
    sample = TokenSample(5, 10, 16, 57)
    origin = sample.origin(range(4, 7))
    assert origin["sequence"].dtype == origin["position"].dtype == np.int32
    assert np.array_equal(sample.rows(range(4, 7)), (origin["sequence"] - 4) * 16 + origin["position"])
    assert np.array_equal(origin["position"], np.concatenate([sample.positions(sequence) for sequence in (4, 5, 6)]))


def test_sentences_give_tokens_in_proportion_and_never_their_first() -> None:
    lengths_S = np.array([2, 40, 7, 40, 3, 12, 7, 2])
    for tokens in (8, 57, int((lengths_S - 1).sum())):
        sample = SentenceSample(3, lengths_S, tokens)
        taken = [sample.positions(sentence) for sentence in range(8)]
        assert sum(map(len, taken)) == tokens == sample.sampled(range(8))
        assert all(
            one.min() >= 1 and one.max() < length for one, length in zip(taken, lengths_S, strict=True) if len(one)
        )
        shares = tokens * (lengths_S - 1) / (lengths_S - 1).sum()
        assert all(abs(len(one) - share) < 1 for one, share in zip(taken, shares, strict=True))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_sentences_go_together_with_those_of_their_length(size: int) -> None:
    lengths_S = np.array([9, 4, 9, 4, 4, 6, 9, 2])
    sample, shard = SentenceSample(0, lengths_S, 20), range(2, 8)
    batches = list(sample.batches(shard, size))
    assert all(len(batch.places) <= size for batch in batches)
    assert np.concatenate([batch.places for batch in batches]).tolist() == [0, 4, 3, 1, 2, 5]
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)
    rows = [len(batch.rows) for batch in batches]
    assert sum(rows) == sample.sampled(shard) == len(sample.origin(shard)["position"])
    assert (
        sample.origin(shard)["sequence"].tolist()
        == np.repeat([2, 6, 5, 3, 4, 7], [len(sample.positions(one)) for one in (2, 6, 5, 3, 4, 7)]).tolist()
    )
