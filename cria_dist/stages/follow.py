"""Look at what other processes have done, again and again, while they do it."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def followed(look: Callable[[], None], seconds: float, name: str) -> Generator[None]:
    """Look every so often from a thread of this name until the block ends, and once more then."""
    finished = threading.Event()

    def follow() -> None:
        while True:
            last = finished.wait(seconds)
            look()
            if last:
                return

    follower = threading.Thread(target=follow, name=name, daemon=True)
    follower.start()
    try:
        yield
    finally:
        finished.set()
        follower.join()
