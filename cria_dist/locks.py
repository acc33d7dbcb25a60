"""One process at a time: locks that the system lets go of when their holder dies."""

import fcntl
import logging
import os
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cria_dist.errors import ConfigError

log = logging.getLogger(__name__)


LEASE_SECONDS = 120.0
"""A network file system lets go of a dead node's locks when its lease is over, which is 90 s on Linux's NFS."""


@contextmanager
def alone(folder: Path) -> Generator[None]:
    """Be the only process that carries out the run of a folder, until the block ends or the process dies.

    A process of this machine that is at it is an error at once; one of another machine may be dead, so its lock is
    waited for as long as a lease lasts. A file system without locks is told of in the log, and nobody is kept out.

    Raises:
        ConfigError: another process is at it.
    """
    with _opened(folder / ".lock") as handle:
        deadline = time.monotonic() + LEASE_SECONDS
        while not _taken(handle):
            holder = _holder(handle)
            if holder.startswith(f"{platform.node()},") or time.monotonic() > deadline:
                raise ConfigError(f"another process is at work in {folder} ({holder}); wait for its end or stop it")
            log.warning("%s: waiting for the lock of %s", folder, holder)
            time.sleep(LEASE_SECONDS / 12)
        handle.truncate(0)
        handle.write(f"{platform.node()}, process {os.getpid()}\n")
        handle.flush()
        yield


def is_at_work(folder: Path) -> bool | None:
    """Whether a process carries out the run of a folder; None where this cannot be known from here.

    A lock that is held is seen as far as the file system goes. That none is held is certain only where the last holder
    was of this machine: not every network file system tells of other machines' locks.
    """
    try:
        handle = (folder / ".lock").open(encoding="utf-8")
    except OSError:  # not written by a version with locks, copied without, or another user's
        return None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return None
        fcntl.flock(handle, fcntl.LOCK_UN)
        return False if _holder(handle).startswith(f"{platform.node()},") else None


@contextmanager
def in_turn(path: Path) -> Generator[None]:
    """Wait for another process that holds this lock file, then hold it until the block ends.

    A file system without locks is told of in the log, and nobody waits.
    """
    with _opened(path) as handle:
        _taken(handle, fcntl.LOCK_EX)
        yield


def _opened(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")


def _taken(handle: TextIO, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Whether the lock is ours now, or there are none."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): take care that no second process works there", handle.name, error.strerror
        )
    return True


def _holder(handle: TextIO) -> str:
    handle.seek(0)
    return handle.read().strip()
