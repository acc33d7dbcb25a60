"""Disks that are full, files that are damaged: nothing half-written counts, and running again mends it."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist.errors import DataError
from cria_dist.store.places import adopt
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def clean(toy: Any, tmp_path: Path) -> bytes:
    """The manifest of a run that nothing happened to."""
    return toy.record(LocalStorage(tmp_path / "clean")).storage.read("manifest.json")


def whole_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("free_kb", [4, 20, 60])
def test_a_full_disk(free_kb: int, small_disk: Path, toy: Any, clean: bytes) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes((128 - free_kb) << 10))
    storage = LocalStorage(small_disk / "round-00")
    with pytest.raises(DataError, match=r"round-00/\S+ cannot be written \(No space left on device\); make room"):
        toy.record(storage)
    assert not Recording(storage, "d1").is_complete()
    assert not [path for path in whole_files(small_disk) if path.name.startswith(".")]
    filler.unlink()
    assert toy.record(storage).storage.read("manifest.json") == clean


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A real limit of the kernel, in a process of its own: the bytes run out in the middle of the file."""
    script = (
        "import resource, sys; from pathlib import Path; from cria_dist.store.storage import LocalStorage\n"
        "from cria_dist.errors import DataError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 16}, {resource.RLIM_INFINITY}))\n"
        "try: LocalStorage(Path(sys.argv[1])).write('a/b', bytes(1 << 20))\n"
        "except DataError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path}/a/b cannot be written (File too large)" in answer.stdout
    assert not whole_files(tmp_path)


@pytest.fixture
def without_rights(tmp_path: Path) -> Iterator[Path]:
    """A folder this process may read but not write."""
    folder = tmp_path / "locked"
    folder.mkdir()
    for parent in (folder, *folder.parents[: len(folder.parents) - 2]):
        if parent.owner() == Path.home().owner():
            parent.chmod(0o555 if parent == folder else 0o755)
    if os.geteuid():
        yield folder
    else:
        os.seteuid(NOBODY)
        yield folder
        os.seteuid(0)
    folder.chmod(0o755)


def test_a_folder_without_the_right_to_write(without_rights: Path, toy: Any) -> None:
    with pytest.raises(DataError, match=r"locked/\S+ cannot be written \(Permission denied\).*change the permissions"):
        toy.record(LocalStorage(without_rights))


def test_a_file_where_a_folder_should_be(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "round-00").write_text("")
    with pytest.raises(DataError, match=r"round-00/\S+ cannot be written \(Not a directory\)"):
        toy.record(LocalStorage(tmp_path / "round-00"))


Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NAMES = [
    "activations/layer-001.mlp/shard-00002.units-00000-00004.parquet",
    "moments/layer-000.mlp/shard-00001.units-00000-00004.safetensors",
    "commits/layer-001.mlp/shard-00002.json",
    "manifest.json",
]


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", *NAMES[:2]])
def test_damage_is_mended_by_running_again(name: str, damage: Damage, toy: Any, clean: bytes, tmp_path: Path) -> None:
    """At once, or after the file that the error names was deleted; and then nothing else is recorded again."""
    folder = tmp_path / "round-00"
    storage = LocalStorage(folder)
    toy.record(storage)
    before = {path: path.stat().st_mtime_ns for path in whole_files(folder)}
    damage(folder / name)
    complaint = complaint_of(storage, toy)
    if complaint:
        assert str(folder / name) in complaint
        (folder / name).unlink()
        assert not complaint_of(storage, toy)
    assert storage.read("manifest.json") == clean
    assert Recording(storage, "d1").committed() == {(site, one) for site in toy.sites for one in range(toy.shards)}
    again = {path for path in whole_files(folder) if path.stat().st_mtime_ns != before[path]} - {folder / name}
    assert len(again) <= 3  # the other kind of file of this (site, shard), its commit, the manifest


def complaint_of(storage: LocalStorage, toy: Any) -> str:
    """Run again and read everything: what the error says, empty if there is none."""
    try:
        read_all(toy.record(storage), toy)
    except DataError as error:
        return str(error)
    return ""


def read_all(recording: Recording, toy: Any) -> None:
    for site in toy.sites:
        recording.signals(site)
        recording.moments(site)


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_records_before_the_end(name: str, damage: Damage, toy: Any, clean: bytes, tmp_path: Path) -> None:
    """A run that stopped before its manifest, and whose commit record was damaged or dropped.

    A flipped digit of a checksum is found when the file is read, and then the file is named.
    """
    folder = tmp_path / "round-00"
    storage = LocalStorage(folder)
    toy.record(storage)
    damage(folder / name)
    if name != "manifest.json":
        (folder / "manifest.json").unlink()
    complaint = complaint_of(storage, toy)
    if complaint:
        named = folder / (name if name in complaint else NAMES[0])
        assert str(named) in complaint
        named.unlink()
        assert not complaint_of(storage, toy)
    assert storage.read("manifest.json") == clean


def test_a_damaged_file_that_two_runs_share_is_not_taken_over_again(toy: Any, clean: bytes, tmp_path: Path) -> None:
    one, two = (tmp_path / run / "round-00" for run in ("run-a", "run-b"))
    toy.record(LocalStorage(one))
    shared = Recording(LocalStorage(two), "d1")
    adopt(shared, tmp_path)
    flip(one / NAMES[0])
    with pytest.raises(DataError, match=r"run-b/round-00/activations/\S+ is not what was recorded"):
        read_all(shared, toy)
    (two / NAMES[0]).unlink()
    assert adopt(shared, tmp_path) is None
    read_all(toy.record(shared.storage), toy)
    assert shared.storage.read("manifest.json") == clean


def test_a_file_swapped_for_another_of_the_same_size_is_found_out(toy: Any, tmp_path: Path) -> None:
    recording = toy.record(LocalStorage(tmp_path))
    moments = tmp_path / "moments"
    (first,) = (moments / "layer-000.mlp").glob("shard-00000*")
    (second,) = (moments / "layer-001.mlp").glob("shard-00000*")
    first.write_bytes(second.read_bytes())
    assert recording.is_complete()
    with pytest.raises(DataError, match=r"layer-000\.mlp/shard-00000\S+ is not what was recorded"):
        recording.moments(toy.sites[0])


def test_left_over_temporary_files_are_nobodys(toy: Any, clean: bytes, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "round-00")
    left = tmp_path / "round-00" / "commits" / "layer-000.mlp" / ".shard-00000.json.tmp.1"
    left.parent.mkdir(parents=True)
    left.write_text('{"dig')
    assert toy.record(storage).storage.read("manifest.json") == clean
    assert np.isfinite(Recording(storage, "d1").moments(toy.sites[0]).gram_NN).all()
