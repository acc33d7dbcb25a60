"""Tokens are cut once: later starts take the files over, and damage or another text is never taken for them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, CriaError, DataError
from cria_dist.stages import inputs as stage
from cria_dist.stages.job import Job
from cria_dist.stages.prepare import prepare

RunConfigMaker = Callable[..., RunConfig]


@pytest.fixture
def own(run_config: RunConfigMaker, pico: Path, text_file: Path, tmp_path: Path) -> tuple[RunConfig, Path, Path]:
    """A run whose text and checkpoint are its own: configuration, text, checkpoint."""
    text, model = tmp_path / "text.txt", shutil.copytree(pico, tmp_path / "model")
    shutil.copyfile(text_file, text)
    halves = {"calibration": {"source": str(text)}, "test": {"source": str(text)}}
    return run_config(tmp_path, model={"path": str(model)}, data=halves), text, model


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every time a corpus is read and tokenised."""
    found: list[int] = []
    load = stage.load_tokens

    def counted(*args: Any) -> Any:
        found.append(len(found))
        return load(*args)

    monkeypatch.setattr(stage, "load_tokens", counted)
    return found


def contents(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(job.calibration_path.parent.iterdir())}


def test_a_second_start_reads_no_text(own: tuple[RunConfig, Path, Path], cuts: list[int]) -> None:
    first = prepare(own[0])
    before = contents(first)
    again = prepare(own[0])
    assert len(cuts) == 1
    assert again.digests == first.digests
    assert contents(again) == before
    assert sorted(before) == ["calibration.npy", "test.npy", "tokens.json"]


def test_sequences_of_another_length_are_another_text(run_config: RunConfigMaker, tmp_path: Path) -> None:
    """Their bytes are the same; recordings and measurements of neighbouring runs are told apart by these digests."""
    long, short = (
        prepare(run_config(tmp_path, data={"calibration_sequences": count, "sequence_length": length}))
        for count, length in ((12, 32), (24, 16))
    )
    same = np.load(long.calibration_path).tobytes() == np.load(short.calibration_path).tobytes()
    assert same
    assert long.calibration_digest != short.calibration_digest


def test_a_text_that_is_gone_does_not_stop_a_run_that_has_its_tokens(
    own: tuple[RunConfig, Path, Path], cuts: list[int]
) -> None:
    config, text, _ = own
    job = prepare(config)
    text.unlink()
    assert prepare(config).digests == job.digests
    job.test_path.unlink()
    with pytest.raises(DataError, match="no such file"):
        prepare(config)
    assert len(cuts) == 2


def test_a_touched_text_is_read_again_once(own: tuple[RunConfig, Path, Path], cuts: list[int]) -> None:
    config, text, _ = own
    job = prepare(config)
    os.utime(text, ns=(1, 1))
    assert prepare(config).digests == job.digests
    assert len(cuts) == 2
    prepare(config)
    assert len(cuts) == 2


def test_another_text_of_the_same_size_is_found(own: tuple[RunConfig, Path, Path]) -> None:
    config, text, _ = own
    prepare(config)
    text.write_text(text.read_text().replace("rain", "snow"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"different: digests\.(calibration|test)_tokens"):
        prepare(config)


def test_another_file_in_a_folder_of_text_is_found(run_config: RunConfigMaker, text_file: Path, tmp_path: Path) -> None:
    paragraphs = text_file.read_text().split("\n\n")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train-1.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    config = run_config(tmp_path, data={"calibration": {"source": str(folder)}})
    job = prepare(config)
    assert prepare(config).digests == job.digests
    (folder / "train-0.jsonl").write_text(json.dumps({"text": "this stands before the rest " * 20}) + "\n")
    with pytest.raises(ConfigError, match=r"different: digests\.calibration_tokens"):
        prepare(config)


def test_another_tokenizer_is_found(own: tuple[RunConfig, Path, Path]) -> None:
    config, _, model = own
    prepare(config)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"different: digests\.calibration_tokens"):
        prepare(config)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(offset: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[offset] ^= 4
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage", [flip(0), flip(70), flip(-20), cut_off, Path.unlink, lambda path: path.write_bytes(b"")]
)
@pytest.mark.parametrize("name", ["calibration.npy", "test.npy", "tokens.json"])
def test_damage_is_mended_from_the_text(
    name: str,
    damage: Callable[[Path], None],
    own: tuple[RunConfig, Path, Path],
    cuts: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = prepare(own[0])
    before = contents(job)
    damage(job.calibration_path.with_name(name))
    caplog.clear()
    assert prepare(own[0]).digests == job.digests
    assert contents(job) == before
    assert len(cuts) == 2
    assert name in caplog.text or (name == "tokens.json" and damage is Path.unlink)


def test_damaged_tokens_of_a_changed_text_cannot_be_mended(own: tuple[RunConfig, Path, Path]) -> None:
    config, text, _ = own
    job = prepare(config)
    flip(-1)(job.calibration_path)
    text.write_text("new words " + text.read_text(), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"different: digests\.calibration_tokens"):
        prepare(config)


def test_a_crash_before_the_record_leaves_no_tokens_to_trust(
    own: tuple[RunConfig, Path, Path], cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json = files.write_json

    def stop_at_the_record(path: Path, record: object) -> None:
        if path.name == "tokens.json":
            raise KeyboardInterrupt
        write_json(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", stop_at_the_record)
        with pytest.raises(KeyboardInterrupt):
            prepare(own[0])
    assert prepare(own[0]).calibration_path.is_file()
    assert len(cuts) == 2


TOO_LITTLE: dict[str, tuple[dict[str, Any], type[CriaError], str]] = {
    "fewer sequences than asked": (
        {"data": {"test_sequences": 4000}},
        DataError,
        r"test text has \d+ tokens, but 4000 sequences of 32 need 128000; lower data\.test_sequences to \d+ or data",
    ),
    "no full sequence": (
        {"data": {"sequence_length": 100_000}, "record": {"tokens": 32}},
        DataError,
        r"calibration text has \d+ tokens, but 12 sequences of 100000 need 1200000; not one is full: lower data\.sequ",
    ),
    "shards of nothing": (
        {"record": {"shard_sequences": -1}},
        ConfigError,
        r"record\.shard_sequences=-1: .*greater than or equal to \d; raise it",
    ),
    "sequences of nothing": ({"data": {"sequence_length": 0}}, ConfigError, r"data\.sequence_length=0: .*raise it"),
    "unknown format": (
        {"data": {"calibration": {"format": "xml"}}},
        ConfigError,
        r'data\.calibration\.format="xml": .*\'text\', \'chat\' or \'images\'',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "complaint"), TOO_LITTLE.values(), ids=TOO_LITTLE)
def test_too_little_is_refused(
    changes: dict[str, Any], error: type[CriaError], complaint: str, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(error, match=complaint) as refusal:
        prepare(run_config(tmp_path, **changes))
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.rglob("config.json"))


def test_the_number_of_sequences_named_is_the_number_there_is(run_config: RunConfigMaker, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refusal:
        prepare(run_config(tmp_path, data={"test_sequences": 4000}))
    there = int(str(refusal.value).split("data.test_sequences to ")[1].split()[0])
    prepare(run_config(tmp_path, data={"test_sequences": there}))
    with pytest.raises(DataError):
        prepare(run_config(tmp_path, data={"test_sequences": there + 1}))
