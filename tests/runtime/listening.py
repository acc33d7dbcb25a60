"""Which ports this process and those it has started hold open."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

import psutil


def listeners() -> set[tuple[str, str]]:
    """(process, address) of every TCP port that this process and those it has started hold open."""
    found: set[tuple[str, str]] = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            open_ports = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            found |= {(process.name(), one.laddr.ip.removeprefix("::ffff:")) for one in open_ports}
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def watched() -> Generator[set[tuple[str, str]]]:
    """Collects what :func:`listeners` finds from now until the end of the block."""
    found: set[tuple[str, str]] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            found.update(listeners())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
