"""Whole files or none, digests, and names that are safe as paths."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from cria_dist import files
from cria_dist.errors import ConfigError, DataError


def test_write_bytes_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def half_a_file(temporary: Path) -> None:
    temporary.write_bytes(b"half")
    raise OSError("disk full")


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        files.write_with(tmp_path / "file", half_a_file)
    assert not list(tmp_path.iterdir())


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "file", b"old")
    with pytest.raises(OSError, match="disk full"):
        files.write_with(tmp_path / "file", half_a_file)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_the_final_name_appears_only_when_the_content_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[bool] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        there.append((tmp_path / "file").exists())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "file", b"content")
    assert there[0] is False
    assert (tmp_path / "file").exists()


def test_a_view_of_bytes_is_written_like_the_bytes(tmp_path: Path) -> None:
    view = memoryview(b"xcontentx")[1:-1]
    files.write_bytes(tmp_path / "file", view)
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_hashed_file_is_described(tmp_path: Path) -> None:
    whole = os.urandom(1 << 20)
    found = files.write_hashed(tmp_path / "file", lambda temporary: temporary.write_bytes(whole))
    assert (tmp_path / "file").read_bytes() == whole
    assert found == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()} == files.facts(whole)


def test_json_round_trip_is_sorted(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    files.write_json(tmp_path / "b.json", {"a": [1.5, None], "b": 1})
    assert files.read_json(tmp_path / "a.json") == {"a": [1.5, None], "b": 1}
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json cannot be read \(No such file"):
        files.read_json(tmp_path / "gone.json")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": "\xff\xfe"}'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "torn.json").write_bytes(content)
    with pytest.raises(DataError, match=r"torn\.json is damaged"):
        files.read_json(tmp_path / "torn.json")


def test_digest_depends_on_every_part_and_on_their_boundaries() -> None:
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1})
    different = [("ab",), ("a", "b"), ("b", "a"), (b"ab",), (["a", "b"],), (), ("",), (b"a", b"b"), (b"", b"ab")]
    assert len({files.digest(*parts) for parts in different}) == len(different)


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.file_digest(tmp_path / "file") == expected


@pytest.mark.parametrize("name", ["run", "run-1a2b.3_x", "7", "a" * 128])
def test_plain_names_are_safe(name: str) -> None:
    assert files.safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../x",
        "a/../b",
        "a..b",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0b",
        ".hidden",
        "-rf",
        "a b",
        "ü",
        "a\n",
        "a" * 129,
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot become a file name"):
        files.safe_name(name)


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet") > 0


def test_what_vanishes_while_it_is_taken_over_was_never_there(tmp_path: Path) -> None:
    root = tmp_path / "[runs]"
    for name in ("a", "b", "c", ".d"):
        files.write_bytes(root / name / "times.json", name.encode())
    seen: list[str] = []

    def take(path: Path) -> bool:
        seen.append(path.parent.name)
        (root / "b" / "times.json").unlink(missing_ok=True)  # as whoever deletes a run does
        return path.read_bytes() > b"a"

    assert files.take_over(root, "*/times.json", take) == root / "c" / "times.json"
    assert seen == [".d", "a", "b", "c"]
    assert files.take_over(root, "*/none.json", take) is None
    assert files.take_over(tmp_path / "none", "*/times.json", take) is None
    assert files.take_copy(root, "c/*.json", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"c"
    assert not files.take_copy(root, "b/*.json", tmp_path / "other")


def test_what_may_not_be_read_is_passed_over(tmp_path: Path) -> None:
    for name in ("a", "b"):
        files.write_bytes(tmp_path / name / "times.json", name.encode())

    def take(path: Path) -> bool:
        if path.parent.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return True

    assert files.take_over(tmp_path, "*/times.json", take) == tmp_path / "b" / "times.json"


@pytest.mark.parametrize("reason", [0, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_what_cannot_be_linked_is_copied(reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "new" / "b"
    source.write_bytes(b"content")

    def cannot(self: Path, target: Path) -> None:
        raise OSError(reason, "no links here", str(self), None, str(target))

    if reason:
        monkeypatch.setattr(Path, "hardlink_to", cannot)
    for _ in range(2):  # what is there is replaced
        files.link(source, target)
        assert target.read_bytes() == b"content"
        assert (target.stat().st_ino == source.stat().st_ino) == (not reason)
    with pytest.raises(FileNotFoundError):
        files.link(tmp_path / "none", target)


def test_bytes_below_a_folder(tmp_path: Path) -> None:
    assert files.bytes_below(tmp_path / "none") == 0
    files.write_bytes(tmp_path / "a" / "b" / "c", b"12345")
    files.write_bytes(tmp_path / "d", b"678")
    (tmp_path / "gone").symlink_to(tmp_path / "none")
    assert files.bytes_below(tmp_path) == 8
