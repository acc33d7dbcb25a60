"""Sentences as rows of token numbers, each with the tokenizer's own special tokens.

Shape suffixes: S sentences, T tokens.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cria_dist.errors import DataError
from cria_dist.records import Int32
from cria_dist.stages.examples import PADDING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256
"""Sentences tokenised at a time."""


def encode(sentences: Iterator[str], tokenizer: "PreTrainedTokenizerBase", shape: tuple[int, int], what: str) -> Int32:
    """The first sentences, cut to a number of tokens and padded behind their end.

    Args:
        sentences: the text; reads no further than it has to.
        tokenizer: the model's.
        shape: number of sentences, most tokens of one.
        what: ``calibration`` or ``test``, for messages.

    Returns:
        int32 [S, T], ``PADDING`` behind the end.

    Raises:
        DataError: too few sentences, or one with less than two tokens.
    """
    count, length = shape
    tokens_ST = np.full(shape, PADDING, dtype=np.int32)
    first = itertools.islice(sentences, count)
    there = 0
    while batch := list(itertools.islice(first, BATCH)):
        for tokens in tokenizer(batch, truncation=True, max_length=length)["input_ids"]:
            if len(tokens) < 2:
                raise DataError(f"{what} sentence {there} (from 0) has {len(tokens)} tokens; correct or delete it")
            tokens_ST[there, : len(tokens)] = tokens
            there += 1
    if there < count:
        raise too_few(what, there, count, "sentences")
    return tokens_ST


def too_few(what: str, there: int, wanted: int, items: str) -> DataError:
    """A corpus that ends too soon."""
    remedy = f"lower data.{what}_sequences{f' to {there}' if there else ''}, or give more {items}"
    return DataError(f"the {what} corpus has {there} {items}, but {wanted} were asked for; {remedy}")
