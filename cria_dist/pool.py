"""Where work items run: a pool maps plain callables over items. ``LocalPool`` is this process."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from cria_dist.errors import CriaError, WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool(Protocol):
    """A set of workers; ``map`` yields results as they come, in any order."""

    @property
    def description(self) -> str:
        """What it is, in words, for logs."""
        ...

    def map(
        self,
        make_worker: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        workers: int | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """Build a worker per process with ``make_worker`` and call it on every item.

        Args:
            make_worker: builds the callable in the worker's process; must be picklable, and small.
            items: small picklable items whose ``str`` names them.
            workers: use only that many workers.

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

    def map(
        self,
        make_worker: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        workers: int | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """See :meth:`Pool.map`; ``workers`` makes no difference."""
        del workers
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
