"""Scores of a site: round trip, ownership by digest, nothing executable in the files."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cria_dist.errors import DataError
from cria_dist.records import Scores, Site, Spectrum
from cria_dist.store import site_scores
from cria_dist.store.site_scores import adopt, has_scores, read_scores, write_scores

SITE = Site(3)
SITES = [Site(0), Site(3)]


def scores(site: Site = SITE, edges: bool = True, spectrum: bool = True) -> Scores:
    return Scores(
        site=site,
        keep_N=np.array([0.5, -np.inf, 1e-300, 7.0 + site.layer]),
        cost_N=np.full(4, 96, dtype=np.int64),
        edges_E2=np.array([[0, 1], [2, 3]], dtype=np.int32) if edges else None,
        spectrum=Spectrum(np.array([3.0, 2.0, 0.25]), 1e-9, complete=True) if spectrum else None,
        facts={"dead": 1.0, "input_components": 2.0} if spectrum else {},
    )


def assert_same(found: Scores, expected: Scores) -> None:
    assert found.site == expected.site
    assert np.array_equal(found.keep_N, expected.keep_N)
    assert found.keep_N.dtype == np.float64
    assert np.array_equal(found.cost_N, expected.cost_N)
    assert found.cost_N.dtype == np.int64
    assert found.facts == expected.facts
    assert (found.edges_E2 is None) == (expected.edges_E2 is None)
    if expected.edges_E2 is not None:
        assert np.array_equal(found.edges_E2, expected.edges_E2)
        assert found.edges_E2.dtype == np.int32
    assert (found.spectrum is None) == (expected.spectrum is None)
    if expected.spectrum is not None:
        assert np.array_equal(found.spectrum.values_K, expected.spectrum.values_K)
        assert (found.spectrum.residual, found.spectrum.complete) == (1e-9, True)


@pytest.mark.parametrize("spectrum", [True, False])
@pytest.mark.parametrize("edges", [True, False])
def test_round_trip(edges: bool, spectrum: bool, tmp_path: Path) -> None:
    write_scores(tmp_path, scores(edges=edges, spectrum=spectrum), "d1")
    assert_same(read_scores(tmp_path, SITE), scores(edges=edges, spectrum=spectrum))


def test_a_guard_without_edges_is_not_no_guard(tmp_path: Path) -> None:
    empty = Scores(SITE, np.zeros(3), np.ones(3, np.int64), np.zeros((0, 2), np.int32))
    write_scores(tmp_path, empty, "d1")
    found = read_scores(tmp_path, SITE).edges_E2
    assert found is not None
    assert found.shape == (0, 2)


def test_scores_without_spectrum_do_not_take_an_old_one(tmp_path: Path) -> None:
    write_scores(tmp_path, scores(), "d1")
    write_scores(tmp_path, scores(spectrum=False), "d2")
    assert read_scores(tmp_path, SITE).spectrum is None


def test_scores_belong_to_a_digest(tmp_path: Path) -> None:
    assert not has_scores(tmp_path, SITE, "d1")
    write_scores(tmp_path, scores(), "d1")
    assert has_scores(tmp_path, SITE, "d1")
    assert not has_scores(tmp_path, SITE, "d2")
    assert not has_scores(tmp_path, Site(0), "d1")


def scores_file(folder: Path) -> Path:
    return folder / "scores" / f"{SITE.key}.npz"


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "lacks a field", "a pickle"])
def test_damage_is_not_there_to_has_and_an_error_to_read(damage: str, tmp_path: Path) -> None:
    write_scores(tmp_path, scores(), "d1")
    path = scores_file(tmp_path)
    if damage == "lacks a field":
        np.savez(path, keep=np.zeros(3))
    elif damage == "a pickle":
        np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
        path.with_suffix(".npy").rename(path)
    else:
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": content[:100], "noise": b"not a zip" * 40}[damage])
    assert not has_scores(tmp_path, SITE, "d1")
    with pytest.raises(DataError, match=r"scores/layer-003\.mlp\.npz cannot be read .*run the same command again"):
        read_scores(tmp_path, SITE)


def test_a_planted_object_array_is_never_unpickled(tmp_path: Path) -> None:
    """An npz whose scores are an object array: loading it would run code of whoever wrote it."""
    write_scores(tmp_path, scores(), "d1")
    path = scores_file(tmp_path)
    with np.load(path, allow_pickle=False) as arrays:
        content = dict(arrays)
    np.savez(path, allow_pickle=True, **{**content, "keep": np.array([Trap()], dtype=object)})
    with pytest.raises(DataError, match=r"layer-003\.mlp\.npz cannot be read \(.*allow_pickle"):
        read_scores(tmp_path, SITE)
    np.savez(path, allow_pickle=True, **{**content, "digest": np.array([Trap()], dtype=object)})
    assert not has_scores(tmp_path, SITE, "d1")
    assert not Trap.sprung


class Trap:
    sprung = False

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return spring, ()


def spring() -> None:
    Trap.sprung = True


def test_a_lost_spectrum_is_an_error(tmp_path: Path) -> None:
    write_scores(tmp_path, scores(), "d1")
    (tmp_path / "spectra" / f"{SITE.key}.npz").unlink()
    with pytest.raises(DataError, match=r"spectra/layer-003\.mlp\.npz"):
        read_scores(tmp_path, SITE)


def test_the_same_scores_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_scores(tmp_path / name, scores(), "d1")
    assert scores_file(tmp_path / "a").read_bytes() == scores_file(tmp_path / "b").read_bytes()


def test_scores_are_written_after_their_spectrum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption between the two leaves no scores, so the site is scored again."""

    def fail_at_scores(path: Path, content: bytes) -> None:
        if path.parent.name == "scores":
            raise OSError("disk full")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)

    monkeypatch.setattr(site_scores, "write_bytes", fail_at_scores)
    with pytest.raises(OSError, match="disk full"):
        write_scores(tmp_path, scores(), "d1")
    assert not has_scores(tmp_path, SITE, "d1")


def neighbour(folder: Path, digest: str, sites: list[Site], spectrum: bool = True) -> None:
    for site in sites:
        write_scores(folder, scores(site, spectrum=spectrum), digest)


@pytest.mark.parametrize("spectrum", [True, False])
def test_adopt_links_the_scores_of_a_neighbour(spectrum: bool, tmp_path: Path) -> None:
    source, target = tmp_path / "run-a" / "round-00", tmp_path / "run-b" / "round-00"
    neighbour(source, "d1", SITES, spectrum)
    assert adopt(target, tmp_path, SITES, "d1")
    for site in SITES:
        assert has_scores(target, site, "d1")
        assert_same(read_scores(target, site), scores(site, spectrum=spectrum))
        name = f"scores/{site.key}.npz"
        assert (target / name).stat().st_ino == (source / name).stat().st_ino


def test_adopt_wants_the_same_digest_and_all_sites(tmp_path: Path) -> None:
    target = tmp_path / "run-b" / "round-00"
    neighbour(tmp_path / "run-a" / "round-00", "other", SITES)
    neighbour(tmp_path / "run-c" / "round-00", "d1", SITES[:1])
    assert not adopt(target, tmp_path, SITES, "d1")
    assert not target.exists()
    neighbour(tmp_path / "run-d" / "round-00", "d1", SITES)
    assert adopt(target, tmp_path, SITES, "d1")


def test_adopt_does_not_take_itself(tmp_path: Path) -> None:
    neighbour(tmp_path / "run-a" / "round-00", "d1", SITES)
    assert not adopt(tmp_path / "run-a" / "round-00", tmp_path, SITES, "d1")


@pytest.mark.parametrize("left", [0, 1, 3])
def test_adopt_passes_over_a_neighbour_that_vanishes(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted when so many of its four files have come over."""
    first, target = tmp_path / "run-a" / "round-00", tmp_path / "run-b" / "round-00"
    neighbour(first, "d1", SITES)
    linked, link = [], site_scores.link

    def link_and_delete(source: Path, target: Path) -> None:
        if len(linked) == left:
            shutil.rmtree(tmp_path / "run-a", ignore_errors=True)
        linked.append(source)
        link(source, target)

    monkeypatch.setattr(site_scores, "link", link_and_delete)
    assert not adopt(target, tmp_path, SITES, "d1")
    neighbour(tmp_path / "run-c" / "round-00", "d1", SITES)
    assert adopt(target, tmp_path, SITES, "d1")
    assert_same(read_scores(target, SITE), read_scores(tmp_path / "run-c" / "round-00", SITE))
