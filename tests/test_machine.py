"""How many CPUs a process may use: those of the machine, of its affinity, of its containers."""

import os
from pathlib import Path

import pytest

from cria_dist import machine


@pytest.fixture
def sixty_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.usefixtures("sixty_four")
def test_affinity_counts_where_the_system_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cpus(tmp_path, tmp_path / "own") == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert machine.cpus(tmp_path, tmp_path / "own") == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cpus(tmp_path, tmp_path / "own") == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cpus(tmp_path, tmp_path / "own") == 1


@pytest.mark.usefixtures("sixty_four")
def test_the_smallest_quota_of_its_groups_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("12:cpuset:/elsewhere\n0::/outer/inner\n")
    outer, inner = root / "outer", root / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("100000 100000\n")  # beside the tree
    for at_outer, at_inner, cpus in (
        ("max 100000", "max 100000", 64),
        ("max 100000", "200000 100000", 2),
        ("350000 100000", "800000 100000", 3),  # truncated, as Ray does it
        ("max 100000", "50000 100000", 1),
    ):
        (outer / "cpu.max").write_text(at_outer + "\n")
        (inner / "cpu.max").write_text(at_inner + "\n")
        assert machine.cpus(root, own) == cpus


@pytest.mark.usefixtures("sixty_four")
@pytest.mark.parametrize(("quota", "cpus"), [("-1", 64), ("400000", 4)])
def test_the_quota_of_an_older_kernel_counts(quota: str, cpus: int, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpus(tmp_path, tmp_path / "own") == cpus
