"""What Prometheus finds on the metrics port of a real cluster."""

import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from cria_dist.pool import Counted
from cria_dist.runtime.pool import RayPool
from cria_dist.stages.record import ShardDone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]

NAMES = ("tokens_total", "bytes_written_total", "items_done_total", "retries_total", "queue_depth", "peak_gpu_bytes")


@dataclass(frozen=True)
class Amount:
    size: int

    def counts(self) -> Mapping[str, float]:
        return {"tokens": 10 * self.size, "bytes_written": 100 * self.size, "peak_gpu_bytes": self.size}


def counting(folder: Path) -> Callable[[int], Amount]:
    def work(item: int) -> Amount:
        mark = folder / str(item)
        if item == 3 and not mark.exists():
            import os

            mark.touch()
            os._exit(1)
        return Amount(item)

    return work


def scrape() -> dict[str, float]:
    """Our metrics on all nodes, by name without the prefix."""
    found: dict[str, float] = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if match := re.match(r"ray_cria_(\w+)(?:\{.*\})? (\S+)$", line):
                    found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def wait_for(wanted: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    deadline = time.monotonic() + 90
    while not wanted(found := scrape()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def test_results_of_a_recording_are_counted() -> None:
    done = ShardDone(tokens=32, bytes_written=500)
    assert isinstance(done, Counted)
    assert done.counts() == {"tokens": 32, "bytes_written": 500, "peak_gpu_bytes": 0}


@pytest.mark.slow
@pytest.mark.soak
def test_the_coordinator_tells_prometheus_what_was_done(tmp_path: Path) -> None:
    before = scrape()
    pool = RayPool(workers=2)
    assert len(dict(pool.map(lambda: counting(tmp_path), [1, 2, 3, 4]))) == 4
    pool.release()
    items = before.get("items_done_total", 0.0) + 4
    found = wait_for(lambda now: now.get("items_done_total") == items and set(NAMES) <= set(now))
    grown = {name: found[name] - before.get(name, 0.0) for name in NAMES}
    assert grown["tokens_total"] == 100
    assert grown["bytes_written_total"] == 1000
    assert grown["items_done_total"] == 4
    assert grown["retries_total"] == 1
    assert found["queue_depth"] == 0
    assert found["peak_gpu_bytes"] == 4
