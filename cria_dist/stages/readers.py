"""Rows of a corpus as they lie: Parquet files, hub data sets, the built-in text; text files are in ``lines.py``."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cria_dist.config import CorpusConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.models.location import hub_remedy
from cria_dist.stages.lines import Rows, json_rows, paragraphs, tab_rows

SEPARATOR = "\n\n"
BATCH = 64
"""Rows of a Parquet file decoded at a time."""


def reader_of(source: str) -> Callable[[CorpusConfig], Rows]:
    """What reads a source: by the ending of a file, a built-in text by its name, all else is a hub data set.

    Raises:
        ConfigError: no such built-in text, or a file of no known kind.
        DataError: no such file.
    """
    if source.startswith("builtin:"):
        if source != "builtin:pydoc":
            raise ConfigError(f"source={source!r} is not a built-in text; there is builtin:pydoc")
        return pydoc_paragraphs
    path = Path(source)
    if path.suffix in FILE_READERS and not path.is_dir():
        if not path.is_file():
            raise DataError(f"source={source!r}: no such file; give an existing file")
        return FILE_READERS[path.suffix]
    if path.is_file():
        raise ConfigError(f"source={source!r} is of no known kind; files end in {', '.join(FILE_READERS)}")
    return hub_rows


def _columns(corpus: CorpusConfig) -> dict[str, str]:
    """The columns that are read, by the setting that names them."""
    return {"field": corpus.field} | ({} if corpus.label is None else {"label": corpus.label})


def require_fields(names: Iterable[str], corpus: CorpusConfig) -> None:
    """Refuse a row or file that lacks a column which is read.

    Raises:
        ConfigError: it lacks one.
    """
    there = list(names)
    for setting, column in _columns(corpus).items():
        if column not in there:
            raise ConfigError(f"{setting}={column!r} is not in {corpus.source}; it has: {', '.join(map(repr, there))}")


def pydoc_paragraphs(_: CorpusConfig) -> Rows:
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
            require_fields(file.schema_arrow.names, corpus)
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


def hub_rows(corpus: CorpusConfig) -> Rows:
    """Rows of a hub data set, or of a folder that ``datasets`` understands; how many there are is not known."""
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
            f"{hub_remedy('dataset')}, and give a local file"
        ) from error


def _row_name(row: int) -> str:
    return f"row {row} (from 0)"


FILE_READERS = {".txt": paragraphs, ".tsv": tab_rows, ".jsonl": json_rows, ".parquet": _parquet_rows}
