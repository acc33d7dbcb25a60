"""Items of a corpus, one at a time: what is made of its rows, and which part of them is read."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cria_dist.config import CorpusConfig
from cria_dist.errors import ConfigError
from cria_dist.stages.lines import Rows, paragraphs
from cria_dist.stages.readers import hub_rows, pydoc_paragraphs, reader_of, require_fields

STRETCH = 1 << 16
"""Characters (or bytes of decoded images) of a hub data set that go to one part before the other has its turn."""

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
    reader = reader_of(corpus.source)
    if corpus.format == "chat" and reader in (paragraphs, pydoc_paragraphs):
        raise ConfigError(f'source={corpus.source!r} is plain text without messages; set format="text"')
    if corpus.revision is not None and (reader is not hub_rows or Path(corpus.source).exists()):
        raise ConfigError(f"revision={corpus.revision!r} is for hub data sets; leave it out for {corpus.source}")
    cut = _deal if reader is hub_rows else _halve
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
        require_fields(row, corpus)
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
