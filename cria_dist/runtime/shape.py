"""What a worker asks Ray for, beside what the nodes have."""

from collections import Counter
from dataclasses import dataclass

import ray


@dataclass(frozen=True, slots=True)
class Shape:
    """What one worker is made of.

    Attributes:
        ranks: processes.
        gpus: GPUs of each.
    """

    ranks: int
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one process."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}

    @property
    def cpus(self) -> float:
        """CPUs of each: named, for an actor with a part of a GPU would take a whole one for life."""
        return self.gpus if 0 < self.gpus < 1 else 1.0


def needs_and_nodes(shape: Shape) -> str:
    """What one worker needs beside what the nodes have, for the error when no place is found."""
    together = f"{shape.ranks} x {_amounts(shape.bundle)} on one node" if shape.ranks > 1 else _amounts(shape.bundle)
    nodes = [_amounts(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return f"a worker needs {together}; the nodes have {' | '.join(nodes)} in all"


def cpus_of_a_machine() -> int:
    """CPUs of the machine that has most; all nodes with one address are one machine."""
    cpus = Counter[str]()
    for node in ray.nodes():
        if node["Alive"]:
            cpus[node["NodeManagerAddress"]] += int(node["Resources"].get("CPU", 0))
    return max(cpus.values(), default=0)


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if kind in resources)
