"""The items of one ``map`` that are not finished: which may start now, on which worker, how often each was lost.

Retries are ours (``max_task_retries=0``): Ray's own are used up in the seconds before a dead node is noticed.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from heapq import heappop, heappush
from typing import Generic, TypeVar

from cria_dist.errors import WorkerError
from cria_dist.pool import Flow

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# An innocent item is given up when five workers die with it in hand. With k deaths spread over n items the chance that
# this happens to any of them is below C(k, 5) / n^4: 0.1 % for 20 deaths over 60 shards, 0.1 % for 1000 over 10,000.
# An item that does kill its workers is named after 15 s of back-off (1 + 2 + 4 + 8) and five starts.
MAX_ATTEMPTS = 5
BACK_OFF_SECONDS = 0.5
LONGEST_BACK_OFF_SECONDS = 60.0

Anywhere = None


class Backlog(Generic[Item]):
    """Hands out items in their order, as far as dependencies, homes and back-off allow.

    Args:
        items: what is to be done.
        flow: order among them.
        workers: number of workers; homes are spread over them in turn.
        clock: seconds that only grow.
    """

    def __init__(
        self, items: Sequence[Item], flow: Flow[Item], workers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        numbers = {home: index % workers for index, home in enumerate(sorted(set(flow.homes.values())))}
        self._home = {item: numbers[home] for item, home in flow.homes.items()}
        self._position = {item: position for position, item in enumerate(items)}
        self._behind: dict[Item, list[Item]] = defaultdict(list)
        self._before: dict[Item, int] = {}
        self._ready: dict[int | None, list[tuple[int, Item]]] = defaultdict(list)
        self._delayed: list[tuple[float, int, Item]] = []
        self._losses: Counter[Item] = Counter()
        self._clock = clock
        self.unfinished = self.waiting = len(items)
        for item in items:
            before = self._position.keys() & set(flow.after.get(item, ()))
            for one in before:
                self._behind[one].append(item)
            self._before[item] = len(before)
            if not before:
                self._make_ready(item)

    def take(self, worker: int, absent: Collection[int] = ()) -> Item | None:
        """The first item that may start now on a worker; it may also have those at home on an absent worker."""
        while self._delayed and self._delayed[0][0] <= self._clock():
            self._make_ready(heappop(self._delayed)[2])
        heaps = [self._ready[home] for home in (Anywhere, worker, *absent) if self._ready[home]]
        if not heaps:
            return None
        self.waiting -= 1
        return heappop(min(heaps, key=lambda heap: heap[0][0]))[1]

    def finish(self, item: Item) -> None:
        """An item is done; those that waited for it alone may start."""
        self.unfinished -= 1
        for after in self._behind.pop(item, []):
            self._before[after] -= 1
            if not self._before[after]:
                self._make_ready(after)

    def lose(self, item: Item, error: BaseException) -> None:
        """Put an item back whose worker died, later each time.

        Raises:
            WorkerError: it was lost too often; something about this item kills workers.
        """
        self._losses[item] += 1
        losses = self._losses[item]
        if losses >= MAX_ATTEMPTS:
            raise WorkerError(str(item), f"lost {losses} times, last by: {in_short(error)}; is there enough memory?")
        delay = back_off(losses)
        log.warning("%s was lost (%s), trying again in %.1f s", item, type(error).__name__, delay)
        heappush(self._delayed, (self._clock() + delay, self._position[item], item))
        self.waiting += 1

    def _make_ready(self, item: Item) -> None:
        heappush(self._ready[self._home.get(item, Anywhere)], (self._position[item], item))


def back_off(losses: int) -> float:
    """Seconds to wait after so many losses."""
    return min(BACK_OFF_SECONDS * 2**losses, LONGEST_BACK_OFF_SECONDS)


def in_short(error: BaseException) -> str:
    """The line of Ray's message that says what happened: the last one of a failed start, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "creation task" in lines[0] else 0]
