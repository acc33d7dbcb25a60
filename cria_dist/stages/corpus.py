"""Text or conversations in, blocks of tokens out, and the check that calibration and test text are different text.

Shape suffixes: S sequences, T tokens per sequence, M tokens of a stream, W windows.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cria_dist.config import CorpusConfig, DataConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.records import Int32
from cria_dist.stages.chat import conversation_reader
from cria_dist.stages.readers import SEPARATOR
from cria_dist.stages.sources import plain_text, read_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WINDOW = 64
PIECE = 1 << 18
"""Characters tokenised at a time."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def tokenize(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    sequences: int,
    what: str,
    separator: str = SEPARATOR,
) -> Int32:
    """Cut text into contiguous blocks of tokens; reads at most 262,144 characters more than it has to.

    The documents are joined and tokenised about 262,144 characters at a time (whatever is asked for, so that fewer
    sequences are the first of more), adding no special tokens, so that the result is that of the whole text but for the
    tokens at those joints.

    Args:
        documents: the text.
        tokenizer: a ``transformers`` tokenizer.
        sequence_length: tokens per block.
        sequences: number of blocks.
        what: ``calibration`` or ``test``, for messages.
        separator: what stands between two documents; a blank line, nothing between rendered conversations.

    Returns:
        int32, [sequences, sequence_length].

    Raises:
        DataError: the text is empty or too short.
    """
    needed = sequences * sequence_length
    pieces: list[Int32] = []
    count = 0
    for text in _joined(documents, separator):
        pieces.append(np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32))
        count += pieces[-1].size
        if count >= needed:
            return np.concatenate(pieces)[:needed].reshape(sequences, sequence_length)
    if not count:
        raise DataError(f"the {what} text is empty; check data.{what}: source, field, split and part")
    full = count // sequence_length
    fewer = f"lower data.{what}_sequences to {full} or" if full else "not one is full: lower"
    raise DataError(
        f"the {what} text has {count} tokens, but {sequences} sequences of {sequence_length} need {needed}; "
        f"{fewer} data.sequence_length, or give more text"
    )


def check_overlap(calibration_ST: Int32, test_ST: Int32, max_overlap: float) -> float:
    """Share of the calibration's windows of 64 tokens that also stand somewhere in the test text.

    The windows are cut from the calibration stream one after the other (they are shorter if the sequences are) and
    looked up at every offset of the test stream: by hash, then token by token.

    Raises:
        ConfigError: the share is above ``max_overlap``.
    """
    window = min(WINDOW, calibration_ST.shape[1], test_ST.shape[1])
    calibration_M = calibration_ST.ravel()
    windows_WT = calibration_M[: calibration_M.size // window * window].reshape(-1, window)
    test_WT = np.lib.stride_tricks.sliding_window_view(test_ST.ravel(), window)
    hash_W, test_hash_W = _hashes(windows_WT), _hashes(test_WT)
    order_W = np.argsort(test_hash_W)
    rank_W = np.searchsorted(test_hash_W, hash_W, sorter=order_W)
    found_W = order_W[np.minimum(rank_W, order_W.size - 1)]
    alike_W = np.flatnonzero(test_hash_W[found_W] == hash_W)
    shared_W = alike_W[(test_WT[found_W[alike_W]] == windows_WT[alike_W]).all(axis=1)]
    share = shared_W.size / len(windows_WT)
    if share > max_overlap:
        raise ConfigError(
            f"{shared_W.size} of {len(windows_WT)} calibration windows of {window} tokens ({share:.2%}) are also in "
            f"the test text, first in calibration sequence {shared_W[0] * window // calibration_ST.shape[1]}; "
            f"data.max_overlap={max_overlap} is the limit; give other text or raise data.max_overlap"
        )
    return share


def load_tokens(data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> tuple[Int32, Int32]:
    """Calibration and test tokens of a run, checked for overlap.

    Returns:
        int32 [calibration_sequences, sequence_length] and int32 [test_sequences, sequence_length].

    Raises:
        ConfigError: a source or field does not exist, or the two texts overlap more than ``data.max_overlap``.
        DataError: a text cannot be read, is empty or too short.
    """
    calibration, test = (_documents(corpus, tokenizer) for corpus in (data.calibration, data.test))
    length = data.sequence_length
    calibration_ST = tokenize(
        calibration, tokenizer, length, data.calibration_sequences, "calibration", _separator(data.calibration)
    )
    test_ST = tokenize(test, tokenizer, length, data.test_sequences, "test", _separator(data.test))
    share = check_overlap(calibration_ST, test_ST, data.max_overlap)
    logger.info("%d calibration and %d test tokens, overlap %.2f%%", calibration_ST.size, test_ST.size, 100 * share)
    return calibration_ST, test_ST


def _documents(corpus: CorpusConfig, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    return read_items(corpus, conversation_reader(tokenizer) if corpus.format == "chat" else plain_text)


def _separator(corpus: CorpusConfig) -> str:
    """A chat template ends and begins a conversation itself."""
    return "" if corpus.format == "chat" else SEPARATOR


def _joined(documents: Iterable[str], separator: str) -> Iterator[str]:
    """The documents with separators between them, in pieces of about 262,144 characters; empty text gives none."""
    piece, size, before = list[str](), 0, ""
    for document in documents:
        piece.append(document)
        size += len(document)
        if size >= PIECE:
            yield before + separator.join(piece)
            piece, size, before = [], 0, separator
    if size:
        yield before + separator.join(piece)


def _hashes(windows_WT: Int32) -> NDArray[np.uint64]:
    """Polynomial hash of each window, modulo 2**64."""
    hash_W = np.zeros(len(windows_WT), np.uint64)
    for column_W in windows_WT.T:
        hash_W = hash_W * MULTIPLIER + column_W.astype(np.uint64)
    return hash_W
