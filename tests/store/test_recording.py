"""Commit records, the manifest, and taking over a neighbour's recording."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist import arrays, files
from cria_dist.errors import DataError
from cria_dist.store import places
from cria_dist.store.places import adopt
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

ALL = {(site, shard) for site in (0, 1) for shard in range(3)}


def empty(folder: Path, digest: str = "d1") -> Recording:
    return Recording(LocalStorage(folder), digest)


def complete(toy: Any, folder: Path, digest: str = "d1") -> Recording:
    return toy.record(LocalStorage(folder), digest)


def committed(recording: Recording) -> set[tuple[int, int]]:
    return {(site.layer, shard) for site, shard in recording.committed()}


def commit_path(folder: Path, layer: int, shard: int) -> Path:
    return folder / "commits" / f"layer-{layer:03d}.mlp" / f"shard-{shard:05d}.json"


def data_path(folder: Path, kind: str, layer: int, shard: int) -> Path:
    (path,) = (folder / kind / f"layer-{layer:03d}.mlp").glob(f"shard-{shard:05d}.*")
    return path


def test_nothing_is_there_before_it_is_written(tmp_path: Path) -> None:
    recording = empty(tmp_path)
    assert not recording.is_complete()
    assert not recording.committed()
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        recording.manifest()


def test_a_shard_of_a_site_counts_when_it_is_committed(toy: Any, tmp_path: Path) -> None:
    recording = empty(tmp_path)
    toy.write_shard(recording, toy.sites[1], 2)
    commit = commit_path(tmp_path, 1, 2).read_bytes()
    assert committed(recording) == {(1, 2)}
    commit_path(tmp_path, 1, 2).unlink()
    assert committed(recording) == set()
    commit_path(tmp_path, 1, 2).write_bytes(commit)
    assert committed(recording) == {(1, 2)}


def test_a_commit_of_another_digest_or_schema_does_not_count(toy: Any, tmp_path: Path) -> None:
    toy.write_shard(empty(tmp_path), toy.sites[0], 0)
    assert not empty(tmp_path, "d2").committed()
    path = commit_path(tmp_path, 0, 0)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    assert not empty(tmp_path).committed()


def test_commits_of_the_first_version_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / "shard-00000.json").write_text('{"digest": "d1"}')
    assert not empty(tmp_path).committed()


@pytest.mark.parametrize("kind", ["activations", "moments"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_a_file_of_another_size_does_not_count(kind: str, damage: str, toy: Any, tmp_path: Path) -> None:
    recording = complete(toy, tmp_path)
    path = data_path(tmp_path, kind, 1, 2)
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "shorter" else content + b"x")
    assert committed(recording) == ALL - {(1, 2)}
    assert not recording.is_complete()


def test_a_complete_recording_needs_its_manifest(toy: Any, tmp_path: Path) -> None:
    recording = complete(toy, tmp_path)
    assert recording.is_complete()
    assert not empty(tmp_path, "d2").is_complete()
    (tmp_path / "manifest.json").unlink()
    assert not recording.is_complete()


def test_a_manifest_needs_every_commit(toy: Any, tmp_path: Path) -> None:
    recording = empty(tmp_path)
    toy.write_shard(recording, toy.sites[0], 0)
    with pytest.raises(DataError, match=r"layer-000\.mlp/shard-00001\.json cannot be read"):
        recording.write_manifest(toy.sites, 2)
    assert not (tmp_path / "manifest.json").exists()


def test_the_manifest_does_not_depend_on_the_order_of_the_shards(toy: Any, tmp_path: Path) -> None:
    first, second = complete(toy, tmp_path / "a"), empty(tmp_path / "b")
    for shard in (2, 0, 1):
        for site in reversed(toy.sites):
            toy.write_shard(second, site, shard)
    second.write_manifest(reversed(toy.sites), toy.shards)
    assert first.storage.read("manifest.json") == second.storage.read("manifest.json")


def test_another_schema_is_refused(toy: Any, tmp_path: Path) -> None:
    recording, path = complete(toy, tmp_path), tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(DataError, match=r"manifest\.json has schema 99, this version reads 3; record into another"):
        recording.manifest()


@pytest.mark.parametrize("content", ["[1, 2]", "3", '"text"'])
def test_json_of_another_kind_is_named(content: str, toy: Any, tmp_path: Path) -> None:
    recording = complete(toy, tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is not a record of ours; delete it and run"):
        recording.is_complete()


@pytest.mark.parametrize("sliced", [False, True])
def test_signals_come_in_token_order(sliced: bool, toy: Any, tmp_path: Path) -> None:
    slices = {"slices": toy.halves} if sliced else {}
    recording = toy.record(LocalStorage(tmp_path), **slices)
    for site in toy.sites:
        signals = recording.signals(site)
        assert sorted(signals) == ["gate", "output", "up"]
        for name, signal_NM in signals.items():
            expected = [toy.signals_of(site, shard)[name] for shard in range(toy.shards)]
            assert np.array_equal(signal_NM, np.concatenate(expected).T)
            assert arrays.to_device(signal_NM, "numpy") is signal_NM  # what CuPy takes with one copy to the device
    assert recording.shape(toy.sites[0]) == (toy.width, toy.rows * toy.shards, "float32")


def test_moments_are_those_of_all_shards(toy: Any, tmp_path: Path) -> None:
    recording = complete(toy, tmp_path)
    outputs_NM = recording.signals(toy.sites[0])["output"].astype(np.float64)
    found = recording.moments(toy.sites[0])
    assert found.count == 9
    assert np.allclose(found.total_N, outputs_NM.sum(axis=1), atol=1e-5)
    assert np.allclose(found.gram_NN, outputs_NM @ outputs_NM.T, atol=1e-4)


def test_one_signal_of_one_site(toy: Any, tmp_path: Path) -> None:
    shards = list(complete(toy, tmp_path).shards(toy.sites[1], only=("up",)))
    assert [list(stored.tiles) for _, stored in shards] == [["up"]] * toy.shards
    for shard, (units, stored) in enumerate(shards):
        assert (units.start, units.stop) == (0, toy.width)
        assert np.array_equal(stored.tiles["up"][0][1], toy.signals_of(toy.sites[1], shard)["up"])
        assert stored.tokens["sequence"].tolist() == [shard] * toy.rows


def test_the_place_of_a_recording_is_its_folder(toy: Any, tmp_path: Path) -> None:
    recording = complete(toy, tmp_path)
    assert places.open_recording(tmp_path, None, "d1") == places.recorded(tmp_path) == recording


def test_adopt_links_a_neighbour_of_the_same_digest(toy: Any, tmp_path: Path) -> None:
    source, folder = tmp_path / "run-a" / "round-00", tmp_path / "run-b" / "round-00"
    one, two = complete(toy, source), empty(folder)
    assert adopt(two, tmp_path) == source
    assert two.is_complete()
    for path in (source / "manifest.json", commit_path(source, 1, 2), data_path(source, "activations", 0, 1)):
        assert (folder / path.relative_to(source)).stat().st_ino == path.stat().st_ino
    assert np.array_equal(two.signals(toy.sites[0])["up"], one.signals(toy.sites[0])["up"])


def test_adopt_passes_over_another_digest(toy: Any, tmp_path: Path) -> None:
    complete(toy, tmp_path / "run-a" / "round-00", "other")
    assert adopt(empty(tmp_path / "run-b" / "round-00"), tmp_path) is None
    assert not (tmp_path / "run-b").exists()


def test_adopt_passes_over_an_incomplete_neighbour(toy: Any, tmp_path: Path) -> None:
    complete(toy, tmp_path / "run-a" / "round-00")
    data_path(tmp_path / "run-a" / "round-00", "activations", 0, 1).unlink()
    complete(toy, tmp_path / "run-c" / "round-01")
    assert adopt(empty(tmp_path / "run-b" / "round-00"), tmp_path) == tmp_path / "run-c" / "round-01"


def test_adopt_does_not_take_itself(toy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run-a" / "round-00"
    complete(toy, folder)
    for path in folder.rglob("commits/*/*.json"):
        path.unlink()
    assert adopt(empty(folder), tmp_path) is None


def test_adopt_replaces_what_is_left_of_an_attempt_with_another_digest(toy: Any, tmp_path: Path) -> None:
    complete(toy, tmp_path / "run-a" / "round-00")
    target = tmp_path / "run-b" / "round-00"
    toy.write_shard(empty(target, "old"), toy.sites[0], 0)
    assert adopt(empty(target), tmp_path) is not None
    assert empty(target).is_complete()


@pytest.mark.parametrize("content", ['{"schema": 3, "dig', '{"schema": 99, "digest": "d1", "sites": {}}', "", "[]"])
def test_adopt_is_not_stopped_by_a_damaged_neighbour(content: str, toy: Any, tmp_path: Path) -> None:
    complete(toy, tmp_path / "run-a" / "round-00")
    (tmp_path / "run-a" / "round-00" / "manifest.json").write_text(content)
    complete(toy, tmp_path / "run-c" / "round-00")
    assert adopt(empty(tmp_path / "run-b" / "round-00"), tmp_path) == tmp_path / "run-c" / "round-00"


def delete_run(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def empty_moments(folder: Path) -> None:
    """As far as a deletion has come that has reached neither the manifest nor what is being copied."""
    for path in folder.glob("*/moments/*/*.*"):
        path.unlink()


@pytest.mark.parametrize("delete", [delete_run, empty_moments])
def test_adopt_passes_over_a_neighbour_that_vanishes(
    delete: Callable[[Path], None], toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When three of its files have come over: they are gone on with, and there is no manifest."""
    folder = tmp_path / "run-b" / "round-00"
    complete(toy, tmp_path / "run-a" / "round-00")
    linked, link = [], files.link

    def delete_and_link(source: Path, target: Path) -> None:
        if len(linked) == 3:
            delete(tmp_path / "run-a")
        linked.append(source)
        link(source, target)

    monkeypatch.setattr(files, "link", delete_and_link)
    assert adopt(empty(folder), tmp_path) is None
    assert len(linked) > 3
    assert not (folder / "manifest.json").exists()
    complete(toy, tmp_path / "run-c" / "round-00")
    assert adopt(empty(folder), tmp_path) == tmp_path / "run-c" / "round-00"
    assert empty(folder).is_complete()


def test_adopt_passes_over_a_neighbour_that_may_not_be_read(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(toy, tmp_path / "run-a" / "round-00")
    assert places.is_recorded(tmp_path, "d1")

    def forbidden(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert adopt(empty(tmp_path / "run-b" / "round-00"), tmp_path) is None
    assert not places.is_recorded(tmp_path, "d1")


def test_an_error_that_is_not_a_vanished_neighbour_is_told(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(toy, tmp_path / "run-a" / "round-00")

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target), None, str(source))

    monkeypatch.setattr(files, "link", fail)
    with pytest.raises(OSError, match="No space left on device"):
        adopt(empty(tmp_path / "run-b" / "round-00"), tmp_path)


def test_a_listing_passes_over_what_is_deleted_meanwhile(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("folder/there", b"four")
    (tmp_path / "folder" / "gone").symlink_to(tmp_path / "nowhere")  # listed, and not there when it is asked for
    assert storage.sizes("folder") == {"folder/there": 4}
