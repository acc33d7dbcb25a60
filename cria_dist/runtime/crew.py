"""One worker of a pool: an actor, or a crew of actors that run every item together and fail together.

A crew is placed on one node (``STRICT_PACK``). Each of its processes finds ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``,
and ``LOCAL_WORLD_SIZE`` in its environment, and where they meet in ``CRIA_MEETING``.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cria_dist.errors import CriaError
from cria_dist.pool import as_worker_error
from cria_dist.runtime import meeting

Item = TypeVar("Item")
MakeWorker = Callable[[], Callable[[Any], Any]]


class _Host:
    """A process that holds the worker of the current stage and drops it when the next stage begins."""

    def __init__(self) -> None:
        self._stage = -1
        self._worker: Callable[[Any], Any] | None = None
        self._place: str | None = None

    def gpus(self) -> tuple[str, ...]:
        return tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))

    def new_place(self) -> str:
        return meeting.new_place()

    def join(self, rank: int, place: str, *gpus: tuple[str, ...]) -> None:
        self._place = place
        meeting.stay_on_loopback()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(gpus)),
            "LOCAL_WORLD_SIZE": str(len(gpus)),
        }
        if gpus[0]:  # LOCAL_RANK counts the devices of the crew, so every process has to see them all
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for one in gpus for gpu in one)

    def run(self, stage: int, make_worker: MakeWorker, item: Any) -> Any:
        if self._worker is None or stage != self._stage:
            self._worker = None
            if self._place is not None:  # a file serves one meeting only
                os.environ["CRIA_MEETING"] = f"{self._place}-{stage}"
            self._worker = make_worker()
            self._stage = stage
        return self._worker(item)


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


@dataclass(frozen=True, slots=True)
class Done:
    """An item was done; ``result`` is that of rank 0."""

    item: Any
    result: Any


@dataclass(frozen=True, slots=True)
class Lost:
    """A process of the worker died; whether its item was done is not known."""

    reason: BaseException


class Crew(Generic[Item]):
    """A worker: takes one item at a time once it is ready. Nothing here waits; ``pending`` is what to wait for.

    Args:
        shape: its processes.
    """

    def __init__(self, shape: Shape) -> None:
        self._since = time.monotonic()
        self.shape = shape
        self.item: Item | None = None
        self.is_ready = False
        self._group = _pack(shape) if shape.ranks > 1 else None
        self._hosts = [_start(shape, self._group, rank) for rank in range(shape.ranks)]
        self.pending: list[Any] = [host.gpus.remote() for host in self._hosts]
        if self._group is not None:
            place = self._hosts[0].new_place.remote()
            self.pending = [host.join.remote(rank, place, *self.pending) for rank, host in enumerate(self._hosts)]
        self._answer_of_first = self.pending[0]
        self._result: Any = None

    @property
    def is_idle(self) -> bool:
        """Whether it can take an item."""
        return self.is_ready and not self.pending

    @property
    def seconds_without_a_process(self) -> float:
        """How long it has been trying to start; 0 once it is ready."""
        return 0.0 if self.is_ready else time.monotonic() - self._since

    def start(self, stage: int, made_by: Any, item: Item) -> None:
        """Send an item to every process, and the reference to what makes its worker."""
        self.item = item
        self.pending = [host.run.remote(stage, made_by, item) for host in self._hosts]
        self._answer_of_first = self.pending[0]

    def receive(self, answer: Any) -> Done | Lost | None:
        """Take one answer out of ``pending``; None while the item is not decided.

        Raises:
            WorkerError: the worker raised an error. In a crew only errors of ours count: any other may be the echo of
                another process's death in a collective, so the item is lost.
        """
        self.pending.remove(answer)
        try:
            value = ray.get(answer)
        except RayTaskError as error:
            cause = error.cause or error
            if len(self._hosts) > 1 and not isinstance(cause, CriaError):
                return Lost(cause)
            raise as_worker_error(self.item, cause) from error
        except (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError) as error:
            return Lost(error)
        if answer == self._answer_of_first:
            self._result = value
        if self.pending:
            return None
        if not self.is_ready:
            self.is_ready = True
            return None
        item, self.item = self.item, None
        return Done(item, self._result)

    def replaced(self) -> "Crew[Item]":
        """Close this one and start another in its place."""
        self.close()
        fresh = Crew[Item](self.shape)
        if not self.is_ready:
            fresh._since = self._since
        return fresh

    def close(self) -> None:
        """Kill the processes and give back their place."""
        for host in self._hosts:
            ray.kill(host)
        if self._group is not None:
            remove_placement_group(self._group)
        self.pending = []


def _pack(shape: Shape) -> PlacementGroup:
    return placement_group([shape.bundle] * shape.ranks, strategy="STRICT_PACK")


def _start(shape: Shape, group: PlacementGroup | None, rank: int) -> Any:
    # outside of any group if it has none of its own: that of the Tune trial this may run in has no room for workers
    index = rank if group else -1
    place = PlacementGroupSchedulingStrategy(group, index)  # pyright: ignore[reportArgumentType]  (None is allowed)
    remote: Any = ray.remote(
        num_cpus=shape.cpus, num_gpus=shape.gpus, max_restarts=0, max_task_retries=0, scheduling_strategy=place
    )
    return remote(_Host).remote()


def needs_and_nodes(shape: Shape) -> str:
    """What one worker needs beside what the nodes have, for the error when no place is found."""
    together = f"{shape.ranks} x {_amounts(shape.bundle)} on one node" if shape.ranks > 1 else _amounts(shape.bundle)
    nodes = [_amounts(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return f"a worker needs {together}; the nodes have {' | '.join(nodes)} in all"


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if kind in resources)
