"""Which tokens are stored: stratified over sequences, the same for all sites and any worker."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class TokenSample:
    """The sample of a recording.

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
        """Sorted positions sampled from one sequence.

        ``tokens // sequences`` of them, one more for the first ``tokens % sequences``. The first position is never
        taken: in text it acts as an attention sink with activations of another scale, in images it is the class token.
        """
        quota = self.tokens // self.sequences + (1 if sequence < self.tokens % self.sequences else 0)
        generator = np.random.default_rng((self.seed, sequence))
        return np.sort(1 + generator.choice(self.length - 1, size=quota, replace=False))

    def rows(self, sequences: range) -> torch.Tensor:
        """Indices of the sampled tokens among all tokens of these sequences."""
        rows = [index * self.length + self.positions(sequence) for index, sequence in enumerate(sequences)]
        return torch.from_numpy(np.concatenate(rows))

    def origin(self, sequences: range) -> Mapping[str, np.ndarray]:
        """Sequence and position of the same tokens, int32."""
        positions = [self.positions(sequence) for sequence in sequences]
        origins = np.repeat(np.arange(sequences.start, sequences.stop), [len(chosen) for chosen in positions])
        return {"sequence": origins.astype(np.int32), "position": np.concatenate(positions).astype(np.int32)}
