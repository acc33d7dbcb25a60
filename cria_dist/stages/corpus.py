"""Text in, blocks of tokens out, and the check that calibration and test text are different text.

Shape suffixes: S sequences, T tokens per sequence, M tokens of a stream, W windows.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cria_dist.config import CorpusConfig, DataConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.records import Int32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEPARATOR = "\n\n"
WINDOW = 64
PIECE = 1 << 18
"""Characters tokenised at a time."""
STRETCH = 1 << 16
"""Characters of a hub data set that go to one part before the other has its turn."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Placed = Iterator[tuple[float, str]]
"""Documents with the place in the source at which each begins: 0 is its start, 1 its end."""


def read_documents(corpus: CorpusConfig) -> Iterator[str]:
    """Documents of a corpus, one at a time and in a fixed order.

    A document is a paragraph of a ``.txt`` file (blank lines separate them), a row of a ``.jsonl`` or ``.parquet`` file
    or of a hub data set, or a paragraph of ``builtin:pydoc`` (the language reference of the running Python). A local
    folder that ``datasets.load_dataset`` understands is read like a hub data set.

    ``part`` cuts at half the bytes of a ``.txt`` or ``.jsonl`` file, half the rows of a ``.parquet`` file, half the
    characters of the built-in text. A hub data set is streamed and its length unknown: stretches of 65,536 characters
    (whole documents) are dealt in turn to the first and the second part.

    Raises:
        ConfigError: the kind of source or the field does not exist.
        DataError: the text cannot be read; raised during the iteration.
    """
    reader = _reader(corpus.source)
    wanted = {"all": (0.0, np.inf), "first": (0.0, 0.5), "second": (0.5, np.inf)}
    start, stop = wanted[corpus.part]
    return (document for place, document in reader(corpus) if start <= place < stop)


def tokenize(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", sequence_length: int, sequences: int, what: str
) -> Int32:
    """Cut text into contiguous blocks of tokens; reads no further than it has to.

    The documents are joined with a blank line and tokenised about 262,144 characters at a time, without special
    tokens, so that the result is that of the whole text but for the tokens at those joints.

    Args:
        documents: the text.
        tokenizer: a ``transformers`` tokenizer.
        sequence_length: tokens per block.
        sequences: number of blocks.
        what: ``calibration`` or ``test``, for messages.

    Returns:
        int32, [sequences, sequence_length].

    Raises:
        DataError: the text is empty or too short.
    """
    needed = sequences * sequence_length
    pieces: list[Int32] = []
    count = 0
    for text in _joined(documents):
        pieces.append(np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32))
        count += pieces[-1].size
        if count >= needed:
            return np.concatenate(pieces)[:needed].reshape(sequences, sequence_length)
    if not count:
        raise DataError(f"the {what} text is empty; check data.{what}: source, field, split and part")
    raise DataError(
        f"the {what} text has {count} tokens, but {sequences} sequences of {sequence_length} need {needed}; "
        f"lower data.{what}_sequences or data.sequence_length, or give more text"
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
    length = data.sequence_length
    calibration = read_documents(data.calibration)
    calibration_ST = tokenize(calibration, tokenizer, length, data.calibration_sequences, "calibration")
    test_ST = tokenize(read_documents(data.test), tokenizer, length, data.test_sequences, "test")
    share = check_overlap(calibration_ST, test_ST, data.max_overlap)
    logger.info("%d calibration and %d test tokens, overlap %.2f%%", calibration_ST.size, test_ST.size, 100 * share)
    return calibration_ST, test_ST


def _reader(source: str) -> Callable[[CorpusConfig], Placed]:
    if source.startswith("builtin:"):
        if source != "builtin:pydoc":
            raise ConfigError(f"source={source!r} is not a built-in text; there is builtin:pydoc")
        return _read_pydoc
    path = Path(source)
    if path.suffix in FILE_READERS and not path.is_dir():
        if not path.is_file():
            raise DataError(f"source={source!r}: no such file; give an existing file")
        return FILE_READERS[path.suffix]
    if path.is_file():
        raise ConfigError(f"source={source!r} is of no known kind; files end in {', '.join(FILE_READERS)}")
    return _read_hub


def _read_pydoc(_: CorpusConfig) -> Placed:
    """Unique paragraphs: the topics quote each other, so halves of the plain text would share whole sections."""
    from pydoc_data.topics import topics

    paragraphs = (paragraph.strip("\n") for topic in topics.values() for paragraph in topic.split(SEPARATOR))
    unique: dict[str, str] = {}
    for paragraph in paragraphs:
        unique.setdefault(" ".join(paragraph.split()), paragraph)
    unique.pop("", None)
    total, position = sum(map(len, unique.values())), 0
    for paragraph in unique.values():
        yield position / total, paragraph
        position += len(paragraph)


def _read_txt(corpus: CorpusConfig) -> Placed:
    place, paragraph = 0.0, list[str]()
    for at, _, text in _lines(corpus):
        if text.strip():
            place = place if paragraph else at
            paragraph.append(text)
        elif paragraph:
            yield place, "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield place, "\n".join(paragraph)


def _read_jsonl(corpus: CorpusConfig) -> Placed:
    for place, number, line in _lines(corpus):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{corpus.source} line {number} is not JSON ({error}); correct or delete it") from error
        if not isinstance(row, dict):
            raise DataError(f"{corpus.source} line {number} is not a JSON object; write one object per line")
        yield from _placed_text(place, row, corpus)


def _lines(corpus: CorpusConfig) -> Iterator[tuple[float, int, str]]:
    """Lines of a UTF-8 file with their place and number, without the line end and the byte order mark."""
    path = Path(corpus.source)
    size, position = path.stat().st_size, 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                text = line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} line {number} is not UTF-8 ({error.reason}); convert the file") from error
            yield position / size, number, text
            position += len(line)


def _read_parquet(corpus: CorpusConfig) -> Placed:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(corpus.source) as file:
            rows, row = file.metadata.num_rows, 0
            _require_field(file.schema_arrow.names, corpus)
            for batch in file.iter_batches(batch_size=1024, columns=[corpus.field]):
                for record in batch.to_pylist():
                    yield from _placed_text(row / rows, record, corpus)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{corpus.source} is not a readable Parquet file ({error}); write it again") from error


def _read_hub(corpus: CorpusConfig) -> Placed:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    place, characters = 0.0, 0
    try:
        rows: Any = load_dataset(corpus.source, corpus.subset, split=corpus.split, streaming=True)
        for row in rows:
            for _, text in _placed_text(place, row, corpus):
                yield place, text
                characters += len(text)
                if characters >= STRETCH:
                    place, characters = 0.5 - place, 0
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"source={corpus.source!r} (subset {corpus.subset!r}, split {corpus.split!r}) is neither a local file nor "
            f"a hub data set that can be read here ({reason}); check the name, or give a local file"
        ) from error


def _require_field(names: Iterable[str], corpus: CorpusConfig) -> None:
    there = list(names)
    if corpus.field not in there:
        raise ConfigError(f"field={corpus.field!r} is not in {corpus.source}; it has: {', '.join(map(repr, there))}")


def _placed_text(place: float, row: Mapping[str, Any], corpus: CorpusConfig) -> Placed:
    """The row's text; nothing when it is null."""
    _require_field(row, corpus)
    text = row[corpus.field]
    if isinstance(text, str):
        yield place, text
    elif text is not None:
        kind = type(text).__name__
        raise ConfigError(f"field={corpus.field!r} of {corpus.source} holds {kind}, not text; name a field of text")


def _joined(documents: Iterable[str]) -> Iterator[str]:
    """The documents with separators between them, in pieces of about 262,144 characters; empty text gives none."""
    piece, size, separator = list[str](), 0, ""
    for document in documents:
        piece.append(document)
        size += len(document)
        if size >= PIECE:
            yield separator + SEPARATOR.join(piece)
            piece, size, separator = [], 0, SEPARATOR
    if size:
        yield separator + SEPARATOR.join(piece)


def _hashes(windows_WT: Int32) -> NDArray[np.uint64]:
    """Polynomial hash of each window, modulo 2**64."""
    hash_W = np.zeros(len(windows_WT), np.uint64)
    for column_W in windows_WT.T:
        hash_W = hash_W * MULTIPLIER + column_W.astype(np.uint64)
    return hash_W


FILE_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
