"""Peak memory of a command and all its descendants."""

import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

INTERVAL_SECONDS = 1.0


def run_measured(command: Sequence[str], log: Path) -> tuple[int, int]:
    """Run a command, its output into a file.

    Memory is the sum of the proportional set sizes of the process tree, once a second: pages that several processes
    share (libraries, mapped weights) count once, as they do in the machine.

    Returns:
        Exit code and peak bytes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        finished = threading.Event()
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, finished), daemon=True)
        watcher.start()
        code = process.wait()
        finished.set()
        watcher.join()
    return code, peak[0]


def own_peak_bytes() -> int:
    """Peak resident memory of this program (Linux).

    Not ``getrusage``: its figure survives ``exec``, so a child of a larger process reports its parent's peak.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _watch(pid: int, peak: list[int], finished: threading.Event) -> None:
    while not finished.wait(INTERVAL_SECONDS):
        peak[0] = max(peak[0], _tree_bytes(pid))


def _tree_bytes(pid: int) -> int:
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_proportional_bytes(process) for process in processes)


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
