"""Locks: one process at a time, told by whom; nobody is kept out by a process that died."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cria_dist import locks
from cria_dist.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from cria_dist import locks
with locks.alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_told_who_is_there_until_that_one_dies(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        told = f"process {other.pid}.*wait for its end or stop it"
        with pytest.raises(ConfigError, match=told), locks.alone(tmp_path):
            pytest.fail("two processes were let in")
        assert locks.is_at_work(tmp_path) is True
        other.kill()
    assert locks.is_at_work(tmp_path) is False
    with locks.alone(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    with locks.alone(tmp_path):
        pass  # let go of


def test_the_lock_of_a_machine_that_died_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network file system frees it after a while."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.6)
    (tmp_path / ".lock").write_text("elsewhere, process 7\n")
    with (tmp_path / ".lock").open() as dead:
        fcntl.flock(dead, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="elsewhere, process 7"), locks.alone(tmp_path):
            pytest.fail("the lock was held")
        threading.Timer(0.2, fcntl.flock, (dead, fcntl.LOCK_UN)).start()
        with locks.alone(tmp_path):
            assert "waiting for the lock of elsewhere, process 7" in caplog.text


def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locks.alone(tmp_path / "run"), locks.alone(tmp_path / "run"):
        assert "cannot be locked (Function not implemented)" in caplog.text
    with locks.in_turn(tmp_path / "turn"), locks.in_turn(tmp_path / "turn"):
        assert "turn cannot be locked (Function not implemented)" in caplog.text
