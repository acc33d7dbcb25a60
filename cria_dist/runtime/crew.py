"""One worker of a pool: an actor, or a crew of actors that run every item together and fail together.

A crew is placed on one node (``STRICT_PACK``). Each of its processes finds ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``,
and ``LOCAL_WORLD_SIZE`` in its environment, and where they meet in ``CRIA_MEETING``.
"""

import logging
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
from cria_dist.runtime.backlog import back_off, in_short
from cria_dist.runtime.shape import Shape

log = logging.getLogger(__name__)

Item = TypeVar("Item")
MakeWorker = Callable[[], Callable[[Any], Any]]

MAX_STARTS = 5
"""After so many deaths in a row before it was ready a worker is counted out; 15 s of back-off are between them."""


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

    Attributes:
        deaths: those in its place that died in a row before they were ready.
        last_death: why the last of them did.
    """

    def __init__(self, shape: Shape) -> None:
        self._since = self._due = time.monotonic()
        self.shape = shape
        self.item: Item | None = None
        self.is_ready = False
        self.deaths = 0
        self.last_death = ""
        self._group: PlacementGroup | None = None
        self._hosts: list[Any] = []
        self.pending: list[Any] = []
        self._answer_of_first: Any = None
        self._result: Any = None

    def begin(self) -> None:
        """Start the processes when their time has come; once they are there it does nothing."""
        if self._hosts or time.monotonic() < self._due:
            return
        self._group = _pack(self.shape) if self.shape.ranks > 1 else None
        self._hosts = [_start(self.shape, self._group, rank) for rank in range(self.shape.ranks)]
        self.pending = [host.gpus.remote() for host in self._hosts]
        if self._group is not None:
            place = self._hosts[0].new_place.remote()
            self.pending = [host.join.remote(rank, place, *self.pending) for rank, host in enumerate(self._hosts)]
        self._answer_of_first = self.pending[0]

    @property
    def is_idle(self) -> bool:
        """Whether it can take an item."""
        return self.is_ready and not self.pending

    @property
    def seconds_without_a_process(self) -> float:
        """How long it has been trying to start; 0 once it is ready."""
        return 0.0 if self.is_ready else time.monotonic() - self._since

    def is_missing(self, seconds: float) -> bool:
        """Whether to go on without it: it has been trying to start for longer than that, or died of it too often."""
        return self.seconds_without_a_process > seconds or (self.deaths >= MAX_STARTS and not self.is_ready)

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

    def replaced(self, reason: BaseException) -> "Crew[Item]":
        """Close this one; another takes its place, later each time if none has become ready."""
        self.close()
        fresh = Crew[Item](self.shape)
        if not self.is_ready:
            fresh.deaths, fresh.last_death = self.deaths + 1, in_short(reason)
            delay = back_off(fresh.deaths)
            fresh._since, fresh._due = self._since, time.monotonic() + delay
            log.warning("a worker died before it was ready (%s), starting another in %.1f s", fresh.last_death, delay)
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
