"""Where work items run: a pool maps plain callables over items. ``LocalPool`` is this process."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable

from cria_dist.errors import CriaError, WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Flow(Generic[Item]):
    """How the items of one ``map`` go through the workers; by default in any order, a device to each worker.

    Attributes:
        after: item -> the items that must be finished before it starts; those that are not to be done are.
        homes: item -> number of the only worker that may run it (what it holds stays there). Where there are fewer
            workers than homes they share them; a worker that cannot be started again loses its homes to the others.
        ranks: processes that make up one worker and run every item together, each with ``RANK``, ``WORLD_SIZE``
            and ``CRIA_MEETING`` in its environment.
        sharing: workers one GPU holds at the same time; without GPUs it makes no difference.
    """

    after: Mapping[Item, Collection[Item]] = field(default_factory=dict[Item, Collection[Item]])
    homes: Mapping[Item, int] = field(default_factory=dict[Item, int])
    ranks: int = 1
    sharing: int = 1


@runtime_checkable
class Counted(Protocol):
    """A result that says what was in its item, for whoever watches the pool."""

    def counts(self) -> Mapping[str, float]:
        """Numbers by name: ``tokens`` and ``bytes_written`` (added up), ``peak_gpu_bytes`` (the largest counts)."""
        ...


class Pool(Protocol):
    """A set of workers; ``map`` yields results as they come, in any order."""

    @property
    def description(self) -> str:
        """What it is, in words, for logs."""
        ...

    @property
    def workers(self) -> int:
        """How many items run at the same time."""
        ...

    @property
    def per_machine(self) -> int:
        """At most how many workers share a machine, and its memory: of this pool and of those that run beside it."""
        ...

    @property
    def on_gpus(self) -> bool:
        """Whether the workers have GPUs."""
        ...

    def map(
        self,
        make_worker: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        workers: int | None = None,
        flow: Flow[Item] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """Build a worker per process with ``make_worker`` and call it on every item.

        Args:
            make_worker: builds the callable in the worker's process; must be picklable, and small.
            items: small picklable items whose ``str`` names them.
            workers: use only that many workers.
            flow: order among the items; an item comes after those it depends on in ``items``.

        Yields:
            Each item with its result, in completion order.

        Raises:
            WorkerError: an item failed; the message names it.
        """
        ...

    def release(self) -> None:
        """Give back processes and devices; the next ``map`` starts new ones."""
        ...


class LocalPool:
    """Runs every item in this process, one after the other."""

    description = "this process"
    workers = 1
    per_machine = 1
    on_gpus = False

    def map(
        self,
        make_worker: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        workers: int | None = None,
        flow: Flow[Item] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """See :meth:`Pool.map`; ``workers`` and ``flow`` make no difference: items are run as they come."""
        del workers, flow
        if not items:
            return
        worker = make_worker()
        for item in items:
            try:
                result = worker(item)
            except Exception as error:
                raise as_worker_error(item, error) from error
            yield item, result

    def release(self) -> None:
        """Nothing to give back."""


def as_worker_error(item: object, error: BaseException) -> WorkerError:
    """Name the item; keep the message of our own errors, and the type of all others."""
    reason = str(error) if isinstance(error, CriaError) else f"{type(error).__name__}: {error}"
    return WorkerError(str(item), reason)
