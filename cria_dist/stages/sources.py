"""Items of a corpus, one at a time: rows of local files and hub data sets, paragraphs of text, the built-in text."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cria_dist.config import CorpusConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.stages.lines import Rows, json_rows, paragraphs, tab_rows

SEPARATOR = "\n\n"
STRETCH = 1 << 16
"""Characters (or bytes of decoded images) of a hub data set that go to one part before the other has its turn."""
BATCH = 64
"""Rows of a Parquet file decoded at a time."""

Item = TypeVar("Item")
"""A document, or the RGB values of an image."""
Where = Callable[[], str]
"""Names a value in messages: field, source and row."""
Convert = Callable[[Any, Where], Item | None]
"""Makes an item of a field's value; None leaves the row out."""
Make = Callable[[Any, Callable[[], str]], Item | None]
"""Makes an item of a row and its name; None leaves the row out."""


def read_items(corpus: CorpusConfig, convert: Convert[Item]) -> Iterator[Item]:
    """Items of a corpus, one at a time and in a fixed order; reads no further than it is asked.

    An item is made of a paragraph of a ``.txt`` file (blank lines separate them), of a row of a ``.tsv``, ``.jsonl`` or
    ``.parquet`` file or of a hub data set, or of a paragraph of ``builtin:pydoc`` (the language reference of the
    running Python). A local folder that ``datasets.load_dataset`` understands is read like a hub data set.

    ``part`` cuts at half the bytes of a ``.txt``, ``.tsv`` or ``.jsonl`` file, half the rows of a ``.parquet`` file,
    half the characters of the built-in text. A hub data set is streamed and its length unknown: stretches of 65,536
    characters or bytes of pixels (whole items) are dealt in turn to the first and the second part.

    Raises:
        ConfigError: the kind of source or the field does not exist, or an option does not apply to the source.
        DataError: the source cannot be read; raised during the iteration.
    """
    return _read(corpus, functools.partial(_item, corpus, convert))


def read_labelled(
    corpus: CorpusConfig, convert: Convert[Item], read_label: Callable[[Any, Where], int]
) -> Iterator[tuple[Item, int]]:
    """Items of a corpus with their labels; see :func:`read_items`.

    Raises:
        ConfigError: what :func:`read_items` raises, or the source has no labels.
        DataError: the source cannot be read, or a row has no label that the model knows; during the iteration.
    """
    return _read(corpus, functools.partial(_labelled, corpus, convert, read_label))


def _read(corpus: CorpusConfig, make: Make[Item]) -> Iterator[Item]:
    reader = _reader(corpus.source)
    if corpus.format == "chat" and reader in (paragraphs, _pydoc_paragraphs):
        raise ConfigError(f'source={corpus.source!r} is plain text without messages; set format="text"')
    if corpus.revision is not None and (reader is not _hub_rows or Path(corpus.source).exists()):
        raise ConfigError(f"revision={corpus.revision!r} is for hub data sets; leave it out for {corpus.source}")
    cut = _deal if reader is _hub_rows else _halve
    return cut(reader(corpus), corpus, make)


def plain_text(value: Any, where: Where) -> str | None:
    """A field's text; None when it is null.

    Raises:
        ConfigError: the field holds something else, messages or images for instance.
    """
    if value is None or isinstance(value, str):
        return value
    remedy = "name a field of text"
    if isinstance(value, list):
        remedy += ', or set format="chat" if these are the messages of a conversation'
    is_image = isinstance(value, dict) and {"bytes", "path"} <= value.keys()
    kind = "images" if is_image else type(value).__name__
    raise ConfigError(f"{where()} holds {kind}, not text; {remedy}")


def _halve(rows: Rows, corpus: CorpusConfig, make: Make[Item]) -> Iterator[Item]:
    start, stop = {"all": (0.0, math.inf), "first": (0.0, 0.5), "second": (0.5, math.inf)}[corpus.part]
    for place, name, row in rows:
        if place >= stop:
            return
        item = make(row, name) if place >= start else None
        if item is not None:
            yield item


def _deal(rows: Rows, corpus: CorpusConfig, make: Make[Item]) -> Iterator[Item]:
    turn, size = "first", 0
    for _, name, row in rows:
        item = make(row, name)
        if item is None:
            continue
        if corpus.part in ("all", turn):
            yield item
        size += _size(item)
        if size >= STRETCH:
            turn, size = "second" if turn == "first" else "first", 0


def _size(item: object) -> int:
    """Characters, or bytes of pixels; a label counts for nothing."""
    if isinstance(item, tuple):
        item = item[0]
    return item.nbytes if isinstance(item, np.ndarray) else len(str(item))


def _item(corpus: CorpusConfig, convert: Convert[Item], row: Any, name: Callable[[], str]) -> Item | None:
    if isinstance(row, dict):
        _require_fields(row, corpus)
        row = row[corpus.field]
    return convert(row, functools.partial(_where, "field", corpus, name))


def _labelled(
    corpus: CorpusConfig,
    convert: Convert[Item],
    read_label: Callable[[Any, Where], int],
    row: Any,
    name: Callable[[], str],
) -> tuple[Item, int] | None:
    if not isinstance(row, dict):
        raise ConfigError(
            f"source={corpus.source!r} is plain text without labels; give a .tsv, .jsonl or .parquet file"
        )
    item = _item(corpus, convert, row, name)
    return (
        None
        if item is None
        else (item, read_label(row[corpus.label], functools.partial(_where, "label", corpus, name)))
    )


def _where(key: str, corpus: CorpusConfig, name: Callable[[], str]) -> str:
    return f"{key}={getattr(corpus, key)!r} of {corpus.source} {name()}"


def _columns(corpus: CorpusConfig) -> dict[str, str]:
    """The columns that are read, by the setting that names them."""
    return {"field": corpus.field} | ({} if corpus.label is None else {"label": corpus.label})


def _require_fields(names: Iterable[str], corpus: CorpusConfig) -> None:
    there = list(names)
    for setting, column in _columns(corpus).items():
        if column not in there:
            raise ConfigError(f"{setting}={column!r} is not in {corpus.source}; it has: {', '.join(map(repr, there))}")


def _reader(source: str) -> Callable[[CorpusConfig], Rows]:
    if source.startswith("builtin:"):
        if source != "builtin:pydoc":
            raise ConfigError(f"source={source!r} is not a built-in text; there is builtin:pydoc")
        return _pydoc_paragraphs
    path = Path(source)
    if path.suffix in FILE_READERS and not path.is_dir():
        if not path.is_file():
            raise DataError(f"source={source!r}: no such file; give an existing file")
        return FILE_READERS[path.suffix]
    if path.is_file():
        raise ConfigError(f"source={source!r} is of no known kind; files end in {', '.join(FILE_READERS)}")
    return _hub_rows


def _pydoc_paragraphs(_: CorpusConfig) -> Rows:
    """Unique paragraphs: the topics quote each other, so halves of the plain text would share whole sections."""
    from pydoc_data.topics import topics

    paragraphs = (paragraph.strip("\n") for topic in topics.values() for paragraph in topic.split(SEPARATOR))
    unique: dict[str, str] = {}
    for paragraph in paragraphs:
        unique.setdefault(" ".join(paragraph.split()), paragraph)
    unique.pop("", None)
    total, position = sum(map(len, unique.values())), 0
    for paragraph in unique.values():
        yield position / total, str, paragraph
        position += len(paragraph)


def _parquet_rows(corpus: CorpusConfig) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(corpus.source, buffer_size=1 << 20) as file:
            _require_fields(file.schema_arrow.names, corpus)
            rows, row = file.metadata.num_rows, 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if corpus.part == "second" and row + size <= rows // 2:
                    row += size
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=[*_columns(corpus).values()]):
                    for record in batch.to_pylist():
                        yield row / rows, functools.partial(_row_name, row), record
                        row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{corpus.source} is not a readable Parquet file ({error}); write it again") from error


def _hub_rows(corpus: CorpusConfig) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = load_dataset(
            corpus.source, corpus.subset, split=corpus.split, revision=corpus.revision, streaming=True
        )
        if rows.features:
            rows = rows.decode(False)  # images stay bytes
        for number, row in enumerate(rows):
            yield 0.0, functools.partial(_row_name, number), row
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"source={corpus.source!r} (subset {corpus.subset!r}, split {corpus.split!r}, revision "
            f"{corpus.revision!r}) is neither a local file nor a hub data set that can be read here ({reason}); "
            "check the name, or give a local file"
        ) from error


def _row_name(row: int) -> str:
    return f"row {row} (from 0)"


FILE_READERS = {".txt": paragraphs, ".tsv": tab_rows, ".jsonl": json_rows, ".parquet": _parquet_rows}
