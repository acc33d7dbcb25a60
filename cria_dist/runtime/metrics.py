"""What a pool tells Prometheus, on the metrics port of the coordinator's node.

Tokens per second is ``rate(ray_cria_tokens_total[1m])``, and so on for all counters.
"""

import functools
from typing import Any

from ray.util.metrics import Counter, Gauge

from cria_dist.pool import Counted

SUMS = {
    "tokens": "Tokens that went through a block of the model.",
    "bytes_written": "Bytes written to storage.",
}
PEAKS = {"peak_gpu_bytes": "Largest GPU memory in use in any worker of this stage."}


@functools.cache
def _counter(name: str, description: str) -> Counter:
    return Counter(f"cria_{name}", description)


@functools.cache
def _gauge(name: str, description: str) -> Gauge:
    return Gauge(f"cria_{name}", description)


class Meter:
    """Counts what happens to the items of one ``map``."""

    def __init__(self) -> None:
        self._peaks: dict[str, float] = {}

    def depth(self, waiting: int) -> None:
        """Items that no worker has in hand."""
        _gauge("queue_depth", "Items that no worker has in hand.").set(waiting)

    def lost(self) -> None:
        """An item was lost with its worker."""
        _counter("retries", "Items lost with their worker and tried again.").inc()

    def done(self, result: Any) -> None:
        """An item was done; results that are :class:`~cria_dist.pool.Counted` say what was in it."""
        _counter("items_done", "Items done.").inc()
        counts = result.counts() if isinstance(result, Counted) else {}
        for name, description in SUMS.items():
            if counts.get(name, 0) > 0:
                _counter(name, description).inc(counts[name])
        for name, description in PEAKS.items():
            if counts.get(name, 0) > self._peaks.get(name, 0):
                self._peaks[name] = counts[name]
                _gauge(name, description).set(counts[name])
