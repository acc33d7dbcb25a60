"""Reading text, cutting it into tokens, and telling calibration from test text."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from cria_dist.config import CorpusConfig, DataConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.stages.corpus import check_overlap, load_tokens, tokenize
from cria_dist.stages.sources import plain_text, read_items

Part = Literal["all", "first", "second"]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a start token that must never show up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([*alphabet, "<s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=16)


def documents(source: Path | str, part: Part = "all", **settings: str) -> list[str]:
    return list(read_items(CorpusConfig(source=str(source), part=part, **settings), plain_text))


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_txt_documents_are_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffone\r\nline two\r\n\r\n \r\n\r\nzwölf\n\n\nthree".encode())
    assert documents(path) == ["one\nline two", "zwölf", "three"]


def test_jsonl_reads_the_field_and_skips_blank_lines_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a\\nb", "text": "x"}\n\n{"body": null}\n{"body": "c"}\n', encoding="utf-8")
    assert documents(path, field="body") == ["a\nb", "c"]


def test_parquet_reads_the_field_across_batches(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(2500)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"body": rows, "id": range(2500)}), path, row_group_size=700)
    assert documents(path, field="body") == rows
    assert documents(path, "first", field="body") == rows[:1250]
    assert documents(path, "second", field="body") == rows[1250:]


def test_a_local_folder_goes_through_the_hub_reader(tmp_path: Path) -> None:
    rows = [f"{number} " * 2000 for number in range(100)]
    write_jsonl(tmp_path / "train.jsonl", [{"text": row} for row in rows])
    first, second = documents(tmp_path, "first"), documents(tmp_path, "second")
    assert documents(tmp_path) == rows
    assert sorted(first + second) == sorted(rows)
    assert 0.7 < sum(map(len, first)) / sum(map(len, second)) < 1.5
    assert documents(tmp_path, "first") == first


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_halves_of_a_file_are_disjoint_whole_and_of_like_size(tmp_path: Path, kind: str) -> None:
    rows = [f"document {number} " + "x" * (number * 37 % 300) for number in range(400)]
    path = tmp_path / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(rows), encoding="utf-8")
    else:
        write_jsonl(path, [{"text": row} for row in rows])
    first, second = documents(path, "first"), documents(path, "second")
    assert first + second == rows
    assert abs(sum(map(len, first)) - sum(map(len, second))) < 1000


@pytest.mark.parametrize(
    ("name", "content", "error", "complaint"),
    [
        ("gone.txt", None, DataError, r"gone\.txt.*no such file"),
        ("text.csv", b"text\na\n", ConfigError, r"text\.csv.*\.txt, \.tsv, \.jsonl, \.parquet"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', DataError, "line 2 is not JSON"),
        ("rows.jsonl", b"[1]\n", DataError, "line 1 is not a JSON object"),
        ("rows.jsonl", b'{"body": "a", "id": 1}\n', ConfigError, "field='text' is not in .*'body', 'id'"),
        ("rows.jsonl", b'{"text": 7}\n', ConfigError, "holds int, not text"),
        ("text.txt", b"good\nb\xffd\n", DataError, "line 2 is not UTF-8"),
        ("rows.parquet", b"PAR1 no", DataError, "not a readable Parquet file"),
    ],
)
def test_unreadable_text_is_explained(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=complaint):
        documents(tmp_path / name)


def test_missing_parquet_field_names_the_fields_there_are(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"field='text' is not in .*'body', 'id'"):
        documents(tmp_path / "rows.parquet")


def test_folder_without_the_field_or_the_split_is_explained(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"body": "a"}])
    with pytest.raises(ConfigError, match=r"field='text' is not in .*'body'"):
        documents(tmp_path)
    with pytest.raises(DataError, match=r"split 'test'.*Available splits: \['train'\]"):
        documents(tmp_path, field="body", split="test")


def test_unknown_builtin_text_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"builtin:poems.*builtin:pydoc"):
        documents("builtin:poems")


def test_unreachable_hub_set_is_named() -> None:
    script = (
        "from cria_dist.config import CorpusConfig\n"
        "from cria_dist.errors import DataError\n"
        "from cria_dist.stages.sources import plain_text, read_items\n"
        "try:\n    list(read_items(CorpusConfig(source='no-such-org/no-such-set'), plain_text))\n"
        "except DataError as error:\n    print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, check=True)
    assert "source='no-such-org/no-such-set'" in run.stdout
    assert "give a local file" in run.stdout
    assert run.stdout.count("\n") == 1


def test_blocks_are_contiguous_and_have_no_special_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens_ST = tokenize(["abcd", "efgh", "ijkl"], byte_tokenizer, 4, 4, "test")
    assert tokens_ST.dtype == np.int32
    assert [byte_tokenizer.decode(row) for row in tokens_ST] == ["abcd", "\n\nef", "gh\n\n", "ijkl"]


def test_pieces_are_joined_like_the_whole_text(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [f"{number} " * 50_000 for number in range(4)]
    whole = "\n\n".join(rows)
    tokens_ST = tokenize(rows, byte_tokenizer, 1000, len(whole) // 1000, "test")
    assert byte_tokenizer.decode(tokens_ST.ravel()) == whole[: tokens_ST.size]


def test_reading_stops_when_there_are_enough_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    taken = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(None)
            yield "a" * 1000

    assert tokenize(endless(), byte_tokenizer, 100, 10, "calibration").shape == (10, 100)
    assert len(taken) < 300


def test_too_short_text_says_how_short(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"calibration text has 10 tokens.*3 sequences of 4 need 12.*lower data\."):
        tokenize(["abcd", "efgh"], byte_tokenizer, 4, 3, "calibration")
    assert tokenize(["abcd", "efgh"], byte_tokenizer, 5, 2, "calibration").shape == (2, 5)


@pytest.mark.parametrize("nothing", [[], ["", ""]])
def test_empty_text_is_an_error(byte_tokenizer: PreTrainedTokenizerFast, nothing: list[str]) -> None:
    with pytest.raises(DataError, match=r"the test text is empty.*data\.test"):
        tokenize(nothing, byte_tokenizer, 4, 1, "test")


def brute_share(calibration_ST: np.ndarray, test_ST: np.ndarray, window: int) -> float:
    test = {bytes(test_ST.ravel()[at : at + window]) for at in range(test_ST.size - window + 1)}
    windows = calibration_ST.size // window
    return sum(bytes(part) in test for part in calibration_ST.ravel()[: windows * window].reshape(-1, window)) / windows


@pytest.mark.parametrize(("sequences", "length"), [(9, 128), (7, 96), (30, 10), (20, 64)])
def test_overlap_equals_the_plain_count(sequences: int, length: int) -> None:
    rng = np.random.default_rng(length)
    calibration_ST = rng.integers(0, 50_000, (sequences, length)).astype(np.int32)
    test_ST = rng.integers(0, 50_000, (sequences, length)).astype(np.int32)
    window = min(64, length)
    assert check_overlap(calibration_ST, test_ST, 0.0) == 0.0
    test_ST.reshape(-1)[37 : 37 + 2 * window] = calibration_ST.ravel()[window : 3 * window]
    test_ST.reshape(-1)[:3] = calibration_ST.ravel()[:3]
    share = check_overlap(calibration_ST, test_ST, 1.0)
    assert share == brute_share(calibration_ST, test_ST, window) == 2 / (sequences * length // window)


def test_one_token_of_difference_is_no_overlap() -> None:
    calibration_ST = np.arange(64, dtype=np.int32)[None]
    test_ST = calibration_ST.copy()
    assert check_overlap(calibration_ST, test_ST, 1.0) == 1.0
    test_ST[0, 63] += 1
    assert check_overlap(calibration_ST, test_ST, 0.0) == 0.0


def test_too_much_overlap_says_how_much_and_where() -> None:
    rng = np.random.default_rng(0)
    calibration_ST = rng.integers(0, 99, (10, 128)).astype(np.int32)
    test_ST = rng.integers(0, 99, (4, 128)).astype(np.int32)
    test_ST[1] = calibration_ST[7]
    with pytest.raises(ConfigError, match=r"2 of 20 .*\(10\.00%\).*calibration sequence 7;.*raise data\.max_overlap"):
        check_overlap(calibration_ST, test_ST, 0.05)
    assert check_overlap(calibration_ST, test_ST, 0.1) == 0.1


def test_overlap_of_millions_of_tokens_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    tokens_ST = rng.integers(0, 50_000, (6000, 512)).astype(np.int32)
    started = time.perf_counter()
    assert check_overlap(tokens_ST[:3000], tokens_ST[3000:], 0.0) == 0.0
    assert time.perf_counter() - started < 10


def test_halves_of_the_builtin_text_share_nothing() -> None:
    first, second = documents("builtin:pydoc", "first"), documents("builtin:pydoc", "second")
    for half in (first, second):
        assert len("\n\n".join(half)) > 100_000
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(first + second, BpeTrainer(vocab_size=2000, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    # every offset of the first half, not only the windows that check_overlap cuts
    streams = [np.asarray(tokenizer("\n\n".join(half))["input_ids"], np.int32) for half in (first, second)]
    windows = [{bytes(stream[at : at + 64]) for at in range(stream.size - 63)} for stream in streams]
    assert not windows[0] & windows[1]


def test_the_builtin_text_has_no_paragraph_twice() -> None:
    paragraphs = documents("builtin:pydoc")
    assert len({" ".join(paragraph.split()) for paragraph in paragraphs}) == len(paragraphs)
    assert documents("builtin:pydoc", "first") + documents("builtin:pydoc", "second") == paragraphs


def test_load_tokens_gives_both_texts_and_refuses_the_same_text(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    data = DataConfig(sequence_length=256, calibration_sequences=6, test_sequences=4)
    calibration_ST, test_ST = load_tokens(data, byte_tokenizer)
    assert calibration_ST.shape == (6, 256)
    assert test_ST.shape == (4, 256)
    same = data.model_copy(update={"test": CorpusConfig(part="first")})
    with pytest.raises(ConfigError, match=r"16 of 24 .*\(66\.67%\)"):
        load_tokens(same, byte_tokenizer)
