"""How much of its machine this process may use: containers, batch systems and ``taskset`` leave it a part."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def cpus(root: Path = CGROUP, own: Path = OWN_GROUP) -> int:
    """Whole CPUs for this process, at least one: by its affinity and the quotas of its cgroups.

    Quotas are rounded down, and that of v1 is read at the root, as Ray has it.
    """
    there = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there  # not on macOS and Windows
    limits = [read(group / "cpu.max") for group in own_groups(root, own)]
    limits.append(" ".join(read(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")))
    found = [limit.split() for limit in limits if limit[:1].isdecimal()]  # "max" and -1 are no limits
    return max(1, min(there, affinity, *(int(quota) // int(period) for quota, period in found)))


def own_groups(root: Path = CGROUP, own: Path = OWN_GROUP) -> list[Path]:
    """Folders of this process's cgroup (v2) and of those around it, up to the root."""
    lines = read(own).splitlines()
    folder = root / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    return [group for group in (folder, *folder.parents) if group.is_relative_to(root)]


def read(path: Path) -> str:
    """A file of the kernel; empty where there is none (other systems, no such controller)."""
    return path.read_text().strip() if path.is_file() else ""
