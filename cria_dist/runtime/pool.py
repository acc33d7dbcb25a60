"""The pool on Ray: one actor per worker, a bounded window, retries by the coordinator.

Retries are ours (``max_task_retries=0``): Ray's own are used up in the seconds before a dead node is noticed.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from cria_dist.errors import WorkerError
from cria_dist.pool import Flow, as_worker_error

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_ATTEMPTS = 5
BACK_OFF_SECONDS = 0.5
LONGEST_BACK_OFF_SECONDS = 60.0
REPLACE_AFTER_SECONDS = 120.0


class _Host:
    """A process that holds the worker of the current stage and drops it when the next stage begins."""

    def __init__(self) -> None:
        self._stage = -1
        self._worker: Callable[[Any], Any] | None = None

    def run(self, stage: int, make_worker: Callable[[], Callable[[Any], Any]], item: Any) -> Any:
        if self._worker is None or stage != self._stage:
            self._worker = None
            self._worker = make_worker()
            self._stage = stage
        return self._worker(item)


@dataclass
class _Attempts(Generic[Item]):
    """Items that wait, each with the time before which it must not start and its failed attempts."""

    waiting: deque[tuple[Item, int, float]] = field(default_factory=lambda: deque[tuple[Item, int, float]]())

    def ready(self) -> tuple[Item, int] | None:
        """The next item that may start now."""
        for _ in range(len(self.waiting)):
            item, attempts, not_before = self.waiting.popleft()
            if time.monotonic() >= not_before:
                return item, attempts
            self.waiting.append((item, attempts, not_before))
        return None

    def again(self, item: Item, attempts: int, error: BaseException) -> None:
        """Put a lost item back, later each time.

        Raises:
            WorkerError: it was lost too often; something about this item kills workers.
        """
        if attempts >= MAX_ATTEMPTS:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise WorkerError(str(item), f"lost {attempts} times, last by: {reason[0]}; is there enough memory?")
        delay = min(BACK_OFF_SECONDS * 2**attempts, LONGEST_BACK_OFF_SECONDS)
        log.warning("%s was lost (%s), trying again in %.1f s", item, type(error).__name__, delay)
        self.waiting.append((item, attempts, time.monotonic() + delay))


@dataclass(frozen=True, slots=True)
class _Lost:
    """The item's worker died; whether the item was done is not known."""

    reason: BaseException


def _outcome(future: Any, item: object) -> Any:
    try:
        return ray.get(future)
    except RayTaskError as error:
        raise as_worker_error(item, error.cause or error) from error
    except (RayActorError, OutOfMemoryError) as error:
        return _Lost(error)


class RayPool:
    """Workers as Ray actors; they live from the first ``map`` to ``release``."""

    def __init__(self, workers: int, gpus_per_worker: float = 0.0) -> None:
        self._workers = workers
        self._gpus = gpus_per_worker
        self._actors: list[ActorHandle[_Host]] = []
        self._silent_since: dict[ActorHandle[_Host], float] = {}
        self._stage = 0

    @property
    def description(self) -> str:
        """What it is, in words."""
        devices = f", {self._gpus:g} GPU each" if self._gpus else ""
        return f"{self._workers} Ray worker{'s' if self._workers != 1 else ''}{devices}"

    def map(
        self,
        make_worker: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        workers: int | None = None,
        flow: Flow[Item] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """See :meth:`cria_dist.pool.Pool.map`."""
        del flow
        self._stage += 1
        if self._gpus:
            self.release()  # torch and CuPy keep separate memory pools; a new stage gets an empty GPU
        attempts = _Attempts[Item](deque((item, 0, 0.0) for item in items))
        actors = self._ready_actors(min(workers or self._workers, self._workers, max(len(items), 1)))
        idle = deque(actors)
        running: dict[Any, tuple[ActorHandle[_Host], Item, int]] = {}
        while attempts.waiting or running:
            while idle and (start := attempts.ready()) is not None:
                actor = idle.popleft()
                future = actor.run.remote(self._stage, make_worker, start[0])
                running[future] = (actor, *start)
            if not running:
                time.sleep(0.05)  # every item left waits for its back-off
                continue
            done, _ = ray.wait(list(running), timeout=1.0)
            for future in done:
                actor, item, failed = running.pop(future)
                result = _outcome(future, item)
                if isinstance(result, _Lost):
                    idle.append(self._replacement(actor))
                    attempts.again(item, failed + 1, result.reason)
                    continue
                self._silent_since.pop(actor, None)
                idle.append(actor)
                yield item, result

    def release(self) -> None:
        """Kill the actors; their CPUs and GPUs are free for training."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._silent_since = {}

    def _ready_actors(self, count: int) -> list[ActorHandle[_Host]]:
        while len(self._actors) < count:
            self._actors.append(self._new_actor())
        return self._actors[:count]

    def _new_actor(self) -> ActorHandle[_Host]:
        remote: Any = ray.remote(num_cpus=1, num_gpus=self._gpus, max_restarts=-1, max_task_retries=0)
        return remote(_Host).remote()

    def _replacement(self, actor: ActorHandle[_Host]) -> ActorHandle[_Host]:
        """The actor itself while Ray restarts it; a new one when it stays unavailable."""
        since = self._silent_since.setdefault(actor, time.monotonic())
        if time.monotonic() - since < REPLACE_AFTER_SECONDS:
            return actor
        ray.kill(actor)
        self._silent_since.pop(actor)
        fresh = self._new_actor()
        self._actors[self._actors.index(actor)] = fresh
        return fresh
