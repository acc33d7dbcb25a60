"""Documents of text files that may be larger than memory: the second half is found without reading the first."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cria_dist.config import CorpusConfig
from cria_dist.errors import DataError

BLOCK = 1 << 16
"""Bytes read at a time where the lines themselves are not wanted."""
Rows = Iterator[tuple[float, Callable[[], str], Any]]
"""Rows of a source: the place at which each begins (0 is the start, 1 the end), its name for messages, its content.

The name is a function because the number of a line costs reading all that stands before it.
"""


def paragraphs(corpus: CorpusConfig) -> Rows:
    """Paragraphs of a UTF-8 file; blank lines separate them.

    Raises:
        DataError: not UTF-8; names the line.
    """
    place, name, paragraph = 0.0, str, list[str]()
    for at, line_name, line in _lines(corpus):
        if line.strip():
            place, name = (place, name) if paragraph else (at, line_name)
            paragraph.append(line)
        elif paragraph:
            yield place, name, "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield place, name, "\n".join(paragraph)


def json_rows(corpus: CorpusConfig) -> Rows:
    """Objects of a JSONL file, one per line; blank lines count for nothing.

    Raises:
        DataError: a line is not UTF-8, not JSON or not an object; names the line.
    """
    for place, name, line in _lines(corpus):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{corpus.source} {name()} is not JSON ({error}); correct or delete it") from error
        if not isinstance(row, dict):
            raise DataError(f"{corpus.source} {name()} is not a JSON object; write one object per line")
        yield place, name, row


def tab_rows(corpus: CorpusConfig) -> Rows:
    """Rows of a table with a tab between the columns, as one object each; the first line names the columns.

    Quotation marks are text like any other: SST-2 and its like are written without quoting.

    Raises:
        DataError: a line is not UTF-8 or has another number of columns; names the line.
    """
    with Path(corpus.source).open("rb") as handle:
        heading = handle.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    columns = heading.split("\t")
    for place, name, line in _lines(corpus):
        if not line.strip() or (place == 0 and line == heading):
            continue
        values = line.split("\t")
        if len(values) != len(columns):
            raise DataError(
                f"{corpus.source} {name()} has {len(values)} columns and the first line names {len(columns)} "
                f"({', '.join(columns)}); correct or delete it"
            )
        yield place, name, dict(zip(columns, values, strict=True))


def _lines(corpus: CorpusConfig) -> Rows:
    """Lines without the line end and the byte order mark; for the second half from the last line that is not in it."""
    path = Path(corpus.source)
    size = path.stat().st_size
    with path.open("rb") as handle:
        position = _line_start(handle, size // 2) if corpus.part == "second" else 0
        handle.seek(position)
        for line in handle:
            name = functools.partial(_line_name, path, position)
            try:
                text = line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} {name()} is not UTF-8 ({error.reason}); convert the file") from error
            yield position / size, name, text
            position += len(line)


def _line_start(handle: BinaryIO, position: int) -> int:
    """Where the line begins that ends at or goes over a byte position (its line end is before it or at it)."""
    position = max(0, position - 1)
    while position > 0:
        start = max(0, position - BLOCK)
        handle.seek(start)
        newline = handle.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0


def _line_name(path: Path, position: int) -> str:
    """``line 7``: counts the lines before a byte position."""
    number, left = 1, position
    with path.open("rb") as handle:
        while left:
            block = handle.read(min(BLOCK, left))
            number += block.count(b"\n")
            left -= len(block)
    return f"line {number}"
