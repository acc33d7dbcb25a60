"""The pool on Ray: a coordinator that hands one item at a time to every worker and replaces those that die.

One item, not two: an item queued behind one that kills its worker would be accused with it, and what a second one saves
is the 2-4 ms between an answer and the next item.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from cria_dist.errors import WorkerError
from cria_dist.pool import Flow
from cria_dist.runtime.backlog import Backlog
from cria_dist.runtime.crew import Crew, Lost
from cria_dist.runtime.metrics import Meter
from cria_dist.runtime.shape import Shape, cpus_of_a_machine, needs_and_nodes

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

START_SECONDS = 300.0
"""After this long without a process a worker is counted out: its items go to others, if there are any."""
PATIENT_SECONDS = 1800.0
"""As long as training (``PATIENT_ATTEMPTS``) a stage waits for its first worker where the cluster starts nodes."""
TELL_SECONDS = 60.0
WAIT_SECONDS = 0.5


class RayPool:
    """Workers as Ray actors; they live from the first ``map`` to ``release``.

    Args:
        workers: how many.
        gpus_per_worker: GPUs of each.
        waits: for a cluster that grows on demand.
        together: workers of all pools that work at the same time; 0: one per CPU. Default: this one's.
    """

    def __init__(
        self, workers: int, gpus_per_worker: float = 0.0, waits: bool = False, together: int | None = None
    ) -> None:
        self._workers = workers
        self._gpus = gpus_per_worker
        self._waits = waits
        self._together = workers if together is None else together
        self._crews: list[Crew[Any]] = []
        self._stage = 0
        self._told = 0

    @property
    def description(self) -> str:
        """What it is, in words."""
        devices = f", {self._gpus:g} GPU each" if self._gpus else ""
        return f"{self._workers} Ray worker{'s' if self._workers != 1 else ''}{devices}"

    @property
    def workers(self) -> int:
        """See :attr:`cria_dist.pool.Pool.workers`."""
        return self._workers

    @property
    def per_machine(self) -> int:
        """See :attr:`cria_dist.pool.Pool.per_machine`; without GPUs a worker takes a CPU."""
        cpus = max(1, cpus_of_a_machine())
        return min(self._together or cpus, cpus)

    @property
    def on_gpus(self) -> bool:
        """See :attr:`cria_dist.pool.Pool.on_gpus`."""
        return self._gpus > 0

    def map(
        self,
        make_worker: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        workers: int | None = None,
        flow: Flow[Item] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """See :meth:`cria_dist.pool.Pool.map`."""
        if not items:
            return
        flow = flow or Flow()
        shape = Shape(flow.ranks, self._gpus / flow.sharing)
        places = self._workers * (flow.sharing if self._gpus else 1)
        crews = self._crew_up(shape, min(workers or places, len(items), max(places // flow.ranks, 1)))
        backlog = Backlog(items, flow, len(crews))
        meter = Meter()
        made_by = ray.put(make_worker)  # once, not with every item: what is kept of a large model is megabytes
        try:
            while backlog.unfinished:
                self._hand_out(crews, backlog, made_by)
                meter.depth(backlog.waiting)
                for number, answer in _answers(crews):
                    crew = crews[number]
                    if answer not in crew.pending:
                        continue  # of a crew that another answer has just ended
                    outcome = crew.receive(answer)
                    if isinstance(outcome, Lost):
                        crews[number] = self._crews[number] = crew.replaced(outcome.reason)
                        if crew.item is not None:
                            meter.lost()
                            backlog.lose(crew.item, outcome.reason)
                    elif outcome is not None:
                        meter.done(outcome.result)
                        backlog.finish(outcome.item)
                        yield outcome.item, outcome.result
                self._check_starts(crews)
        finally:
            self._drop_unfinished()

    def release(self) -> None:
        """Kill the actors; their CPUs and GPUs are free for training."""
        for crew in self._crews:
            crew.close()
        self._crews = []

    def _crew_up(self, shape: Shape, count: int) -> list[Crew[Any]]:
        """The workers of a new stage."""
        self._stage += 1
        if self._gpus or shape.ranks > 1 or any(crew.shape != shape for crew in self._crews):
            # torch and CuPy keep separate memory pools, and a process group cannot be formed twice
            self.release()
        while len(self._crews) < count:
            self._crews.append(Crew(shape))
        return self._crews[:count]

    def _hand_out(self, crews: list[Crew[Any]], backlog: Backlog[Any], made_by: Any) -> None:
        for crew in crews:
            crew.begin()
        absent = {number for number, crew in enumerate(crews) if crew.is_missing(START_SECONDS)}
        for number, crew in enumerate(crews):
            if crew.is_idle and (item := backlog.take(number, absent)) is not None:
                crew.start(self._stage, made_by, item)

    def _check_starts(self, crews: list[Crew[Any]]) -> None:
        """Say every minute that no worker has started yet.

        Raises:
            WorkerError: none will.
        """
        limit = PATIENT_SECONDS if self._waits else START_SECONDS
        if all(crew.is_missing(limit) for crew in crews):
            raise WorkerError("workers", _why_none_started(crews, limit))
        waited = min(crew.seconds_without_a_process for crew in crews)
        if waited // TELL_SECONDS > self._told:
            needs = needs_and_nodes(crews[0].shape)
            log.warning("no worker has started in %.0f s; waiting for at most %.0f s; %s", waited, limit, needs)
        self._told = int(waited // TELL_SECONDS)

    def _drop_unfinished(self) -> None:
        """Close the workers that still have an item when the stage ends early; its answer would meet the next one."""
        for crew in self._crews:
            if crew.item is not None:
                crew.close()
        self._crews = [crew for crew in self._crews if crew.item is None]


def _why_none_started(crews: list[Crew[Any]], seconds: float) -> str:
    """Why workers died at their start if they did, else what they ask for beside what there is."""
    worst = max(crews, key=lambda crew: crew.deaths)
    if not worst.deaths:
        return f"none started in {seconds:g} s; {needs_and_nodes(crews[0].shape)}"
    return (
        f"none started; one died {worst.deaths} times before it was ready, last by: {worst.last_death}; has every node "
        "the packages of this one, and enough memory?"
    )


def _answers(crews: list[Crew[Any]]) -> list[tuple[int, Any]]:
    """Wait for answers: (number of the worker, answer)."""
    owner = {answer: number for number, crew in enumerate(crews) for answer in crew.pending}
    if not owner:
        time.sleep(WAIT_SECONDS / 10)  # every item left waits for its back-off
        return []
    done, _ = ray.wait(list(owner), timeout=WAIT_SECONDS)
    return [(owner[answer], answer) for answer in done]
