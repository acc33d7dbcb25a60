"""Write the sites of a shard while the layers after them still compute."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np

from cria_dist.records import Site
from cria_dist.stages.observer import Observer
from cria_dist.store.activations import SignalTable
from cria_dist.store.recording import Recording


class ShardWriter:
    """A thread that encodes and stores one site after the other; leaving the context waits for it.

    Encoding, hashing and writing let go of the interpreter's lock, so the disk is waited for beside the computation.

    Args:
        recording: where to write.
        shard: number of the shard.
        origin: integer columns of the sampled tokens (sequence, position).
        dtype: data type of stored signals.
    """

    def __init__(self, recording: Recording, shard: int, origin: Mapping[str, np.ndarray], dtype: str) -> None:
        self._recording = recording
        self._shard = shard
        self._origin = origin
        self._dtype = dtype
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cria-write")
        self._parts: dict[Site, Future[dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Finish what was begun; after an error, begin nothing more."""
        self._thread.shutdown(cancel_futures=kind is not None)

    def hand_over(self, site: Site, observer: Observer) -> None:
        """Check and write what was observed of a site; the observer must not be reset before its part is there."""
        self._parts[site] = self._thread.submit(self._write, site, observer)

    def parts(self) -> Iterator[tuple[Site, dict[str, Any]]]:
        """Each site with its part of the commit record, in the order they were handed over, once it is stored.

        Raises:
            NumericError: what was observed is not finite, or does not fit the storage data type.
            DataError: it cannot be stored.
        """
        for site, part in self._parts.items():
            yield site, part.result()

    def _write(self, site: Site, observer: Observer) -> dict[str, Any]:
        observer.check(site, self._shard)
        units, table = observer.units, SignalTable(observer.signals(), self._origin, self._dtype)
        part = {
            "start": units.start,
            "stop": units.stop,
            "signals": self._recording.write_signals(site, self._shard, units, table),
        }
        sums = observer.moments()
        if sums is not None:
            part["moments"] = self._recording.write_moments(site, self._shard, units, sums)
        return part
