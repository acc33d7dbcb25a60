"""Documents of a corpus, one at a time: local files, hub data sets, the built-in text."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cria_dist.config import CorpusConfig
from cria_dist.errors import ConfigError, DataError

SEPARATOR = "\n\n"
STRETCH = 1 << 16
"""Characters of a hub data set that go to one part before the other has its turn."""
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


FILE_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
