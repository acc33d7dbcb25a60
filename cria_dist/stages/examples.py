"""What a classifier reads and what it should say: examples in memory, a batch of them as a model takes it.

Sentences are rows of one array, filled up with ``PADDING`` behind their end. Shapes: S examples, T tokens, C classes
(of logits) or channels, H and W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cria_dist.errors import ConfigError
from cria_dist.files import digest

PADDING = -1
"""Stands behind the end of a sentence; no token has this number."""
ALIKE = 4
"""Sentences that are padded to the longest of them."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Labelled examples.

    Attributes:
        inputs: int32 [S, T] of sentences, or float32 [S, C, H, W] of images.
        labels_S: int64.
    """

    inputs: np.ndarray
    labels_S: np.ndarray

    def __len__(self) -> int:
        """How many there are."""
        return len(self.labels_S)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Examples":
        """Some of them."""
        return Examples(self.inputs[chosen], self.labels_S[chosen])

    def split(self, size: int) -> tuple["Examples", ...]:
        """In groups of at most ``size``, as ``torch.Tensor.split`` does it."""
        return tuple(self[start : start + size] for start in range(0, max(len(self), 1), size))

    def tensors(self, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Keyword arguments for the model, and the labels."""
        inputs = {name: tensor.to(device) for name, tensor in model_inputs(self.inputs).items()}
        return inputs, torch.tensor(self.labels_S, dtype=torch.int64, device=device)


Data = torch.Tensor | Examples
"""What is trained on or scored: sequences of tokens [S, T], or labelled examples."""


def read_examples(inputs_path: Path, labels_path: Path) -> Examples:
    """The examples of a run; inputs stay on storage until they are asked for."""
    inputs = np.load(inputs_path, mmap_mode="r", allow_pickle=False)
    return Examples(inputs, np.load(labels_path, allow_pickle=False))


def model_inputs(inputs: np.ndarray) -> dict[str, torch.Tensor]:
    """Examples as keyword arguments of a ``transformers`` model.

    Sentences are cut to the longest of them; there is an attention mask only if others are shorter.
    """
    if inputs.ndim > 2:
        return {"pixel_values": torch.from_numpy(np.array(inputs))}
    tokens_ST = torch.from_numpy(inputs[:, : sentence_lengths(inputs).max()].astype(np.int64))
    there_ST = tokens_ST != PADDING
    if there_ST.all():
        return {"input_ids": tokens_ST}
    return {"input_ids": tokens_ST.clamp(min=0), "attention_mask": there_ST.to(torch.int64)}


def sentence_lengths(inputs_ST: np.ndarray) -> np.ndarray:
    """Tokens of every sentence, [S]."""
    return (inputs_ST != PADDING).sum(axis=1)


def unpadded(examples: Examples, size: int) -> Iterator[Examples]:
    """All examples in batches of at most ``size``, sentences only with those of the same length."""
    if examples.inputs.ndim > 2:
        yield from examples.split(size)
        return
    lengths_S = sentence_lengths(examples.inputs)
    for length in np.unique(lengths_S):
        yield from examples[np.flatnonzero(lengths_S == length)].split(size)


def check_same_examples(calibration: np.ndarray, test: np.ndarray, max_overlap: float) -> float:
    """Share of the calibration examples that are among the test examples too, to the last token or pixel.

    Raises:
        ConfigError: the share is above ``max_overlap``.
    """
    scored = {digest(row.tobytes()) for row in test}
    same = [number for number, row in enumerate(calibration) if digest(row.tobytes()) in scored]
    share = len(same) / len(calibration)
    if share > max_overlap:
        raise ConfigError(
            f"{len(same)} of {len(calibration)} calibration examples ({share:.2%}) are also test examples, the first "
            f"is number {same[0]} (from 0); data.max_overlap={max_overlap} is the limit; give other examples or raise "
            "data.max_overlap"
        )
    return share


def like_examples(examples: Examples) -> tuple[Examples, ...]:
    """A batch in parts that are trained on together: images at once, sentences with those of about the same length.

    A part is padded to its longest sentence. In batches of 16 of SST-2's phrases, three numbers of five would be
    padding without the parts (62 %), one of five is with them (21 %).
    """
    if examples.inputs.ndim > 2:
        return (examples,)
    return examples[np.argsort(sentence_lengths(examples.inputs), kind="stable")].split(ALIKE)
