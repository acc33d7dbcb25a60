"""How much memory a worker may use, measured where workers live."""

import functools
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from cria_dist import machine
from cria_dist.config import RunConfig
from cria_dist.pool import Pool

SHARE = 0.9
"""Of what is there: the rest is for the allocator's fragments, CUDA's context and other processes."""


def of_worker(config: RunConfig, pool: Pool) -> int:
    """Bytes one worker may use: ``record.memory_gb``, or what a worker measures.

    All workers are taken to be alike.
    """
    if config.record.memory_gb is not None:
        return of_machine(config, pool.workers)
    make = functools.partial(_measurer, pool.per_machine)
    return dict(pool.map(make, ["memory of a worker"], workers=1))["memory of a worker"]


def of_machine(config: RunConfig, workers: int) -> int:
    """The same if the workers were on this machine, which holds at most one per CPU."""
    if config.record.memory_gb is not None:
        return int(config.record.memory_gb * 1e9)
    return measure(min(workers, machine.cpus()))


def measure(workers: int) -> int:
    """Bytes a worker on this machine may use: its GPU's, or its part of the free memory.

    Args:
        workers: workers on this machine.
    """
    if torch.cuda.is_available():
        return int(SHARE * torch.cuda.mem_get_info()[1])
    free = min(psutil.virtual_memory().available, container_free())
    return int(SHARE * free / workers)


def container_free(root: Path = machine.CGROUP, own: Path = machine.OWN_GROUP) -> float:
    """Bytes left under the limits of this process's cgroup (v2) and of those around it; infinity without limits.

    Pages of files that nobody uses (``inactive_file``) count as free: the kernel gives them up first.
    """
    left = float("inf")
    for group in machine.own_groups(root, own):
        limit = machine.read(group / "memory.max")
        if limit.isdecimal():
            facts = dict(line.split() for line in machine.read(group / "memory.stat").splitlines())
            used = int(machine.read(group / "memory.current")) - int(facts.get("inactive_file", 0))
            left = min(left, max(0, int(limit) - used))
    return left


def _measurer(workers: int) -> Callable[[str], int]:
    return lambda _: measure(workers)
