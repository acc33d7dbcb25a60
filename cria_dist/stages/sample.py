"""Which tokens are stored: stratified over sequences, the same for all sites and any worker.

It also says which sequences go through a model together, because sentences of different lengths never do: nothing is
padded, so no padding can be among what is observed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.stages.examples import sentence_lengths


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one length that go through a model together.

    Attributes:
        places: where they are in their shard.
        rows: the sampled tokens among all of theirs.
        length: tokens of each, where the shard has sequences of other lengths too; else None.
    """

    places: slice | np.ndarray
    rows: torch.Tensor
    length: int | None = None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """What a shard has of these sequences: their tokens, pixels or hidden states."""
        return values[self.places] if self.length is None else values[self.places, : self.length]

    def put(self, values: torch.Tensor, part: torch.Tensor) -> None:
        """Write the part of these sequences into an array of the shard."""
        if self.length is None:
            values[self.places] = part
        else:
            values[self.places, : self.length] = part.to(values)


class Sample(ABC):
    """The sampled tokens of a recording, and the batches its shards are run in."""

    sequences: int
    """Number of calibration sequences or examples."""

    @abstractmethod
    def positions(self, sequence: int) -> np.ndarray:
        """Sorted positions sampled from one sequence.

        The first position is never taken: in text it acts as an attention sink with activations of another scale, in
        images and sentences it is the class token.
        """

    @abstractmethod
    def count(self, sequences: range) -> int:
        """Tokens of these sequences, sampled or not."""

    @abstractmethod
    def batches(self, sequences: range, size: int) -> Iterator[Batch]:
        """The sequences of a shard in batches of at most ``size``, in the order in which they are stored."""

    @abstractmethod
    def order(self, sequences: range) -> np.ndarray:
        """The sequences of a shard in the order in which they go through the model."""

    def origin(self, sequences: range) -> Mapping[str, np.ndarray]:
        """Sequence and position of the tokens sampled from a shard, as they are stored, int32."""
        order = self.order(sequences)
        positions = [self.positions(sequence) for sequence in order.tolist()]
        origins = np.repeat(order, [len(chosen) for chosen in positions])
        return {"sequence": origins.astype(np.int32), "position": np.concatenate(positions).astype(np.int32)}

    def sampled(self, sequences: range) -> int:
        """How many tokens are sampled from a shard."""
        return sum(len(self.positions(sequence)) for sequence in sequences)


@dataclass(frozen=True, slots=True)
class TokenSample(Sample):
    """A sample of sequences of equal length, or of images.

    Attributes:
        seed: seed of the run.
        sequences: number of calibration sequences or images.
        length: tokens per sequence, patches and class token of an image; all are real, none is padding.
        tokens: tokens sampled over all sequences.
    """

    seed: int
    sequences: int
    length: int
    tokens: int

    def positions(self, sequence: int) -> np.ndarray:
        """``tokens // sequences`` of them, one more for the first ``tokens % sequences``."""
        quota = self.tokens // self.sequences + (1 if sequence < self.tokens % self.sequences else 0)
        return _drawn(self.seed, sequence, self.length, quota)

    def count(self, sequences: range) -> int:
        """Tokens of these sequences, sampled or not."""
        return len(sequences) * self.length

    def batches(self, sequences: range, size: int) -> Iterator[Batch]:
        """One after the other."""
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            yield Batch(slice(start, start + len(part)), self.rows(part))

    def rows(self, sequences: range) -> torch.Tensor:
        """Indices of the sampled tokens among all tokens of these sequences."""
        rows = [index * self.length + self.positions(sequence) for index, sequence in enumerate(sequences)]
        return torch.from_numpy(np.concatenate(rows))

    def order(self, sequences: range) -> np.ndarray:
        """As they come."""
        return np.arange(sequences.start, sequences.stop)


class SentenceSample(Sample):
    """A sample of sentences of different lengths: each gives tokens in proportion to those it has.

    Args:
        seed: seed of the run.
        lengths_S: tokens of every sentence.
        tokens: tokens sampled over all sentences.
    """

    def __init__(self, seed: int, lengths_S: np.ndarray, tokens: int) -> None:
        self._seed = seed
        self._lengths_S = lengths_S
        self.sequences = len(lengths_S)
        before_S = np.concatenate([[0], np.cumsum(lengths_S - 1)])
        self._shares_S = np.diff(before_S * tokens // before_S[-1])

    def positions(self, sequence: int) -> np.ndarray:
        """The share of a sentence's tokens but the first, rounded so that the shares add up."""
        return _drawn(self._seed, sequence, int(self._lengths_S[sequence]), int(self._shares_S[sequence]))

    def count(self, sequences: range) -> int:
        """Tokens of these sentences, sampled or not."""
        return int(self._lengths_S[sequences.start : sequences.stop].sum())

    def batches(self, sequences: range, size: int) -> Iterator[Batch]:
        """The longest first, so that an array made for the first batch holds all of them; none is padded."""
        order = self.order(sequences)
        lengths = self._lengths_S[order]
        for same in np.split(order, np.flatnonzero(np.diff(lengths)) + 1):
            length = int(self._lengths_S[same[0]])
            for start in range(0, len(same), size):
                part = same[start : start + size]
                rows = [index * length + self.positions(sequence) for index, sequence in enumerate(part.tolist())]
                yield Batch(part - sequences.start, torch.from_numpy(np.concatenate(rows)), length)

    def order(self, sequences: range) -> np.ndarray:
        """By length, the longest first; sentences of one length as they come."""
        lengths = self._lengths_S[sequences.start : sequences.stop]
        return sequences.start + np.argsort(-lengths, kind="stable")


def sample_of(family: MlpFamily, config: ModelDict, inputs: np.ndarray, tokens: int, seed: int) -> Sample:
    """The sample of a recording.

    Args:
        family: adapter of the model.
        config: its config.json.
        inputs: calibration tokens [S, T], sentences padded behind their end, or pixels [S, C, H, W].
        tokens: tokens sampled over all of them.
        seed: seed of the run.
    """
    if family.takes == "sentences":
        return SentenceSample(seed, sentence_lengths(inputs), tokens)
    count, length = inputs.shape[:2]
    return TokenSample(seed, count, family.positions(config, length), tokens)


def _drawn(seed: int, sequence: int, length: int, quota: int) -> np.ndarray:
    generator = np.random.default_rng((seed, sequence))
    return np.sort(1 + generator.choice(length - 1, size=quota, replace=False))
