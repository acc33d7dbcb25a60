"""A program is asked in a process of its own, which may hang or run out of memory without taking the run along."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

TIMEOUT_SECONDS = 1800


class NoAnswerError(Exception):
    """The process was ended from outside, which says nothing about what it was asked."""


def complaint(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end.

    Args:
        command: the program and its arguments.
        environment: variables beside those of this process.

    Returns:
        The last line it wrote to standard error where it failed; nothing where it did not.

    Raises:
        NoAnswerError: it took longer than ``TIMEOUT_SECONDS``, or was killed.
        OSError: it cannot be started.
    """
    whole = {**os.environ, **(environment or {})}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=whole, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"no answer within {error.timeout:,.0f} s") from error
    if run.returncode == -signal.SIGKILL:
        raise NoAnswerError("its process was killed, as the system does where memory is short")
    if run.returncode:
        return (run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"])[-1]
    return ""
