"""Commit records, the manifest, and taking over a neighbour's recording."""

import json
from pathlib import Path

import numpy as np
import pytest

from cria_dist.errors import DataError
from cria_dist.records import Site
from cria_dist.store import activations, moments
from cria_dist.store.recording import Recording, adopt

SITES = (Site(0), Site(1))
N = 4


def write_shard(recording: Recording, shard: int) -> None:
    rng = np.random.default_rng(shard)
    facts = {}
    for site in SITES:
        signals = {name: rng.normal(size=(3, N)).astype(np.float32) for name in ("gate", "up", "output")}
        tokens = {"sequence": np.full(3, shard, np.int32)}
        path = recording.signal_path(site, shard)
        signal_facts = activations.write_shard(path, signals, tokens, "float32", site.key)
        total_N, gram_NN = signals["output"].sum(axis=0), signals["output"].T @ signals["output"]
        moment_facts = moments.write_moments(recording.moments_path(site, shard), 3, total_N, gram_NN)
        facts[site.key] = {"signals": {**signal_facts, "width": N}, "moments": moment_facts}
    recording.commit(shard, facts, "float32")


def complete(folder: Path, digest: str = "d1", shards: int = 3) -> Recording:
    recording = Recording(folder, digest)
    for shard in range(shards):
        write_shard(recording, shard)
    recording.write_manifest(shards)
    return recording


def test_nothing_is_there_before_it_is_written(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "d1")
    assert not recording.is_complete()
    assert not recording.is_committed(0)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        recording.manifest()


def test_a_shard_counts_when_it_is_committed(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "d1")
    write_shard(recording, 0)
    commit = recording.commit_path(0).read_bytes()
    assert recording.is_committed(0)
    recording.commit_path(0).unlink()
    assert not recording.is_committed(0)
    recording.commit_path(0).write_bytes(commit)
    assert recording.is_committed(0)
    assert not recording.is_committed(1)


def test_a_commit_of_another_digest_does_not_count(tmp_path: Path) -> None:
    write_shard(Recording(tmp_path, "d1"), 0)
    assert not Recording(tmp_path, "d2").is_committed(0)


@pytest.mark.parametrize("kind", ["signal_path", "moments_path"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_a_shard_with_a_file_of_another_size_does_not_count(kind: str, damage: str, tmp_path: Path) -> None:
    recording = complete(tmp_path)
    path: Path = getattr(recording, kind)(SITES[1], 2)
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "shorter" else content + b"x")
    assert [recording.is_committed(shard) for shard in range(3)] == [True, True, False]
    assert not recording.is_complete()


def test_a_complete_recording_needs_its_manifest_and_all_commits(tmp_path: Path) -> None:
    recording = complete(tmp_path)
    assert recording.is_complete()
    assert not Recording(tmp_path, "d2").is_complete()
    recording.commit_path(1).unlink()
    assert not recording.is_complete()
    write_shard(recording, 1)
    assert recording.is_complete()
    recording.manifest_path.unlink()
    assert not recording.is_complete()


def test_a_manifest_needs_every_commit(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "d1")
    write_shard(recording, 0)
    with pytest.raises(DataError, match=r"shard-00001\.json cannot be read"):
        recording.write_manifest(2)
    assert not recording.manifest_path.exists()


def test_the_manifest_does_not_depend_on_the_order_of_the_shards(tmp_path: Path) -> None:
    first = complete(tmp_path / "a")
    second = Recording(tmp_path / "b", "d1")
    for shard in (2, 0, 1):
        write_shard(second, shard)
    second.write_manifest(3)
    assert first.manifest_path.read_bytes() == second.manifest_path.read_bytes()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    recording = complete(tmp_path)
    manifest = json.loads(recording.manifest_path.read_text())
    recording.manifest_path.write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(DataError, match="has schema 99, this version reads 1"):
        recording.manifest()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    recording = complete(tmp_path)
    recording.manifest_path.write_bytes(recording.manifest_path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        recording.manifest()


def test_signals_come_in_token_order(tmp_path: Path) -> None:
    recording = complete(tmp_path)
    signals = recording.signals(SITES[1])
    assert sorted(signals) == ["gate", "output", "up"]
    assert {signal_NM.shape for signal_NM in signals.values()} == {(N, 9)}
    for shard in range(3):
        rng = np.random.default_rng(shard)
        [rng.normal(size=(3, N)) for _ in range(3)]  # the first site's
        expected = {name: rng.normal(size=(3, N)).astype(np.float32) for name in ("gate", "up", "output")}
        for name, signal_TN in expected.items():
            assert np.array_equal(signals[name][:, 3 * shard : 3 * shard + 3], signal_TN.T)


def test_moments_are_those_of_all_shards(tmp_path: Path) -> None:
    recording = complete(tmp_path)
    outputs_NM = recording.signals(SITES[0])["output"].astype(np.float64)
    found = recording.moments(SITES[0])
    assert found.count == 9
    assert np.allclose(found.total_N, outputs_NM.sum(axis=1), atol=1e-5)
    assert np.allclose(found.gram_NN, outputs_NM @ outputs_NM.T, atol=1e-4)


def test_readers_trust_only_the_manifest(tmp_path: Path) -> None:
    """A file swapped for another of the same size is found out when it is read."""
    recording = complete(tmp_path)
    path = recording.moments_path(SITES[0], 0)
    path.write_bytes(recording.moments_path(SITES[1], 0).read_bytes())
    assert recording.is_complete()
    with pytest.raises(DataError, match=r"layer-000\.mlp/shard-00000\.safetensors is not what was recorded"):
        recording.moments(SITES[0])


def test_adopt_links_a_neighbour_of_the_same_digest(tmp_path: Path) -> None:
    source = complete(tmp_path / "run-a" / "round-00")
    target = Recording(tmp_path / "run-b" / "round-00", "d1")
    assert adopt(target, tmp_path) == source.folder
    assert target.is_complete()
    for path in (source.manifest_path, source.commit_path(2), source.signal_path(SITES[0], 1)):
        twin = target.folder / path.relative_to(source.folder)
        assert twin.stat().st_ino == path.stat().st_ino
    assert np.array_equal(target.signals(SITES[0])["up"], source.signals(SITES[0])["up"])


def test_adopt_passes_over_another_digest(tmp_path: Path) -> None:
    complete(tmp_path / "run-a" / "round-00", "other")
    target = Recording(tmp_path / "run-b" / "round-00", "d1")
    assert adopt(target, tmp_path) is None
    assert not target.folder.exists()


def test_adopt_passes_over_an_incomplete_neighbour(tmp_path: Path) -> None:
    source = complete(tmp_path / "run-a" / "round-00")
    source.signal_path(SITES[0], 1).unlink()
    whole = complete(tmp_path / "run-c" / "round-01")
    assert adopt(Recording(tmp_path / "run-b" / "round-00", "d1"), tmp_path) == whole.folder


def test_adopt_does_not_take_itself(tmp_path: Path) -> None:
    recording = complete(tmp_path / "run-a" / "round-00")
    recording.commit_path(0).unlink()
    assert adopt(recording, tmp_path) is None


def test_adopt_replaces_what_is_left_of_an_own_attempt(tmp_path: Path) -> None:
    complete(tmp_path / "run-a" / "round-00")
    target = Recording(tmp_path / "run-b" / "round-00", "d1")
    write_shard(Recording(target.folder, "old"), 0)
    assert adopt(target, tmp_path) is not None
    assert target.is_complete()


@pytest.mark.parametrize("content", ['{"schema": 1, "dig', '{"schema": 99, "digest": "d1", "shards": []}', ""])
def test_adopt_is_not_stopped_by_a_damaged_neighbour(content: str, tmp_path: Path) -> None:
    damaged = complete(tmp_path / "run-a" / "round-00")
    damaged.manifest_path.write_text(content)
    whole = complete(tmp_path / "run-c" / "round-00")
    assert adopt(Recording(tmp_path / "run-b" / "round-00", "d1"), tmp_path) == whole.folder


def test_adopt_is_not_stopped_by_a_neighbours_damaged_commit(tmp_path: Path) -> None:
    complete(tmp_path / "run-a" / "round-00").commit_path(1).write_text("{")
    whole = complete(tmp_path / "run-c" / "round-00")
    assert adopt(Recording(tmp_path / "run-b" / "round-00", "d1"), tmp_path) == whole.folder
