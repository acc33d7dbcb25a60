"""Sources larger than memory: no more is read than is asked for, and errors still name their place."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from cria_dist.config import CorpusConfig
from cria_dist.errors import ConfigError, CriaError, DataError
from cria_dist.stages import lines
from cria_dist.stages.corpus import tokenize
from cria_dist.stages.sources import plain_text, read_items, read_labelled

Part = Literal["all", "first", "second"]


def documents(source: Path | str, part: Part = "all", **settings: Any) -> Iterator[str]:
    return read_items(CorpusConfig(source=str(source), part=part, **settings), plain_text)


def bytes_read() -> int:
    """Bytes this process has asked the system for so far."""
    counters = Path("/proc/self/io")
    if not counters.is_file():
        pytest.skip("this system does not count bytes read per process")
    return int(counters.read_text().split("rchar:")[1].split()[0])


class CountedRows:
    """A streamed data set that counts the rows it gives."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.features = rows.features
        self.given = 0

    def decode(self, enable: bool) -> "CountedRows":
        self.rows = self.rows.decode(enable)
        return self

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.given += 1
            yield row


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CountedRows, dict[str, Any]]]:
    """Data sets opened through ``datasets.load_dataset``, with the options they were opened with."""
    found: list[tuple[CountedRows, dict[str, Any]]] = []
    load = datasets.load_dataset

    def counted(*args: Any, **options: Any) -> CountedRows:
        found.append((CountedRows(load(*args, **options)), options))
        return found[-1][0]

    monkeypatch.setattr(datasets, "load_dataset", counted)
    return found


def write_rows(path: Path, rows: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"{row:05d} " + "x" * 993}) + "\n" for row in range(rows)))
    return path


@pytest.mark.parametrize(("sequences", "most"), [(1, 263), (4000, 526)])
def test_a_data_set_is_streamed_no_further_than_the_sequences_need(
    sequences: int, most: int, pico: Path, tmp_path: Path, opened: list[Any]
) -> None:
    """999 characters and as many tokens a row; they are tokenised 262,144 characters at a time."""
    write_rows(tmp_path / "train.jsonl", 2000)
    tokenizer = AutoTokenizer.from_pretrained(pico)
    tokens_ST = tokenize(documents(tmp_path), tokenizer, 100, sequences, "calibration")
    assert tokens_ST.shape == (sequences, 100)
    ((rows, options),) = opened
    assert sequences * 100 / 1001 <= rows.given <= most
    assert options["streaming"] is True


def test_fewer_sequences_are_the_first_of_more(pico: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 700)
    tokenizer = AutoTokenizer.from_pretrained(pico)
    few, many = (tokenize(documents(path), tokenizer, 128, count, "test") for count in (5, 4000))
    assert (few == many[:5]).all()


def test_the_second_half_of_a_data_set_is_streamed_too(tmp_path: Path, opened: list[Any]) -> None:
    write_rows(tmp_path / "train.jsonl", 2000)
    assert next(documents(tmp_path, "second")).startswith("00066 ")
    assert opened[0][0].given == 67


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_the_second_half_of_a_file_is_found_without_reading_the_first(suffix: str, tmp_path: Path) -> None:
    path, half = tmp_path / f"rows.{suffix}", 100 << 20
    row = b'{"text": "found"}' if suffix == "jsonl" else b"found"
    with path.open("wb") as handle:  # a sparse file: the first half is one unreadable line
        handle.seek(half - 1000)
        handle.write(b"\n" * 2000 + row + b"\n\n")
        handle.truncate(2 * half - 1)
        handle.seek(2 * half - 1)
        handle.write(b"\n")
    before = bytes_read()
    assert next(documents(path, "second")) == "found"
    assert bytes_read() - before < 1 << 20


def test_row_groups_of_the_other_half_are_not_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [rng.randbytes(500).hex() for _ in range(8000)]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "rows.parquet", row_group_size=1000)
    before = bytes_read()
    assert next(documents(tmp_path / "rows.parquet", "second")) == rows[4000]
    assert bytes_read() - before < (tmp_path / "rows.parquet").stat().st_size // 3
    assert list(documents(tmp_path / "rows.parquet", "second")) == rows[4000:]


@pytest.mark.parametrize("count", [8, 9])
@pytest.mark.parametrize("group", [1, 3, 7, 10])
def test_halves_of_a_parquet_file_do_not_depend_on_its_row_groups(group: int, count: int, tmp_path: Path) -> None:
    rows = [str(row) for row in range(count)]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "rows.parquet", row_group_size=group)
    middle = (count + 1) // 2
    assert list(documents(tmp_path / "rows.parquet", "first")) == rows[:middle]
    assert list(documents(tmp_path / "rows.parquet", "second")) == rows[middle:]


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_halves_meet_wherever_the_middle_falls(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK", block)
    rng = random.Random(block)
    path = tmp_path / "text.txt"
    sizes: list[tuple[int, int]] = []
    for _ in range(300):
        path.write_bytes("".join(rng.choices(["a", "é", " ", "\n", "\n", "\r\n"], k=rng.randint(1, 30))).encode())
        whole = list(lines.paragraphs(CorpusConfig(source=str(path))))
        first, second = list(documents(path, "first")), list(documents(path, "second"))
        assert first == [text for place, _, text in whole if place < 0.5]
        assert second == [text for place, _, text in whole if place >= 0.5]
        sizes.append((len(first), len(second)))
    assert all(any(pair[half] > 1 for pair in sizes) for half in (0, 1)), (
        "the texts must have paragraphs in both halves"
    )


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [(b"{no", "line 18 is not JSON"), (b'"\xff"', "line 18 is not UTF-8"), (b"7", "line 18 is")],
)
def test_lines_of_the_second_half_keep_their_numbers(broken: bytes, complaint: str, tmp_path: Path) -> None:
    rows = [b'{"text": "a"}'] * 20
    rows[17] = broken
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    assert list(documents(tmp_path / "rows.jsonl", "first")) == ["a"] * 10
    with pytest.raises(DataError, match=rf"rows\.jsonl {complaint}"):
        list(documents(tmp_path / "rows.jsonl", "second"))


def test_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'org/set' .*revision 'abc123'.*no network.*check the name, or download it "):
        list(documents("org/set", revision="abc123"))
    assert asked == [{"split": "train", "revision": "abc123", "streaming": True}]


@pytest.mark.parametrize("source", ["rows.jsonl", ".", "builtin:pydoc"])
def test_only_hub_data_sets_have_revisions(source: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 1)
    source = source if source.startswith("builtin") else str(tmp_path / source)
    with pytest.raises(ConfigError, match=r"revision='abc' is for hub data sets; leave it out"):
        documents(source, revision="abc")


def bad_utf8_column() -> pa.Table:
    """A column of strings whose second value is not UTF-8, as a careless writer leaves it."""
    good, offsets = b"good\xff", pa.array([0, 4, 5], pa.int32()).buffers()[1]
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(good)])})


BAD_TABLES: dict[str, tuple[pa.Table, type[CriaError], str]] = {
    "wrong UTF-8": (bad_utf8_column(), DataError, r"not a readable Parquet file \(.*utf-8.*\); write it again"),
    "bytes": (pa.table({"text": [b"x"]}), ConfigError, r"row 0 \(from 0\) holds bytes, not text; name a field of text"),
    "numbers": (pa.table({"text": [1.5]}), ConfigError, r"row 0 \(from 0\) holds float, not text"),
    "images": (
        pa.table({"text": [{"bytes": b"x", "path": None}]}), ConfigError, r"row 0 .* holds images, not text"
    ),
    "no such field": (pa.table({"a": ["x"], "b": [1]}), ConfigError, r"field='text' is not in .*; it has: 'a', 'b'"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "error", "complaint"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables_are_explained(table: pa.Table, error: type[CriaError], complaint: str, tmp_path: Path) -> None:
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(error, match=complaint) as refusal:
        list(documents(tmp_path / "rows.parquet"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b'{"text": "a"}\n{"text": \n', b'{"text": "\xff"}\n'])
def test_a_broken_file_in_a_folder_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"source=.*\(subset None, split 'train', revision None\).*give a local file"):
        list(documents(tmp_path))


def test_a_missing_test_text_is_said_before_the_calibration_text_is_read(tmp_path: Path) -> None:
    """The kind of source is checked at once, its rows when they are asked for."""
    with pytest.raises(DataError, match="no such file"):
        read_items(CorpusConfig(source=str(tmp_path / "gone.txt")), plain_text)


def test_the_halves_of_a_table_are_its_rows_without_the_heading(tmp_path: Path) -> None:
    rows = [f"sentence number {number}, 'quoted\" as it is\t{number % 2}" for number in range(21)]
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    corpus = CorpusConfig(source=str(tmp_path / "rows.tsv"), label="label")

    def read(part: Part) -> list[tuple[str, int]]:
        one = corpus.model_copy(update={"part": part})
        return list(read_labelled(one, plain_text, lambda value, _: int(value)))

    expected = [(row.split("\t")[0], number % 2) for number, row in enumerate(rows)]
    assert read("all") == expected
    assert [*read("first"), *read("second")] == expected
    assert 8 <= len(read("first")) <= 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\none\t1\ntwo\n", r"rows\.tsv line 3 has 1 columns and the first line names 2 \(text, label\)"),
        ("text\tmark\none\t1\n", r"^label='label' is not in .*rows\.tsv; it has: 'text', 'mark'$"),
    ],
)
def test_a_table_that_does_not_fit_names_its_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text(content, encoding="utf-8")
    corpus = CorpusConfig(source=str(tmp_path / "rows.tsv"), label="label")
    with pytest.raises(CriaError, match=message):
        list(read_labelled(corpus, plain_text, lambda value, _: int(value)))


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    corpus = CorpusConfig(source=str(tmp_path / "text.txt"), label="label")
    with pytest.raises(ConfigError, match=r"is plain text without labels; give a \.tsv, \.jsonl or \.parquet file"):
        list(read_labelled(corpus, plain_text, lambda value, _: int(value)))
