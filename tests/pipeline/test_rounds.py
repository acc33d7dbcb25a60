"""How many sites are analysed and repaired at a time: as many as the memory holds."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.pipeline import prune
from cria_dist.pool import Flow, LocalPool
from cria_dist.stages import analyse, memory


class Pool(LocalPool):
    """Several workers in this process; remembers how many of them a stage was to have."""

    def __init__(self, on_gpus: bool) -> None:
        self.workers = 4
        self.on_gpus = on_gpus
        self.asked: dict[str, tuple[int | None, int]] = {}

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        workers: int | None = None,
        flow: Flow[Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        assert isinstance(make_worker, functools.partial)
        self.asked[make_worker.func.__name__] = (workers, (flow or Flow()).sharing)
        yield from super().map(make_worker, items, workers, flow)


@pytest.fixture
def recorded(run_config: Callable[..., RunConfig], make_context: Callable[..., Any], tmp_path: Path) -> RunConfig:
    """A run on two groups of heads, of 16 signals each, that is recorded."""
    config = run_config(tmp_path, method={"name": "conditional"}, prune={"units": ["attention"], "ratio": 0.5})
    prune(make_context(config), until="record")
    return config


@pytest.mark.parametrize(
    ("on_gpus", "share", "found"),
    [
        (False, 0.5, {"Analyst": (2, 1), "Repairer": (2, 1)}),
        (False, 0.1, {"Analyst": (1, 1), "Repairer": (1, 1)}),
        (False, 9.0, {"Analyst": (4, 1), "Repairer": (4, 1)}),
        (True, 3.5, {"Analyst": (None, 3), "Repairer": (None, 1)}),
        (True, 0.5, {"Analyst": (None, 1), "Repairer": (None, 1)}),
    ],
)
def test_as_many_at_a_time_as_the_memory_holds(
    on_gpus: bool,
    share: float,
    found: dict[str, tuple[int | None, int]],
    recorded: RunConfig,
    make_context: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = analyse.analyst_bytes({"moments", "weights"}, recorded.record.tokens, 2 * 16, 32)
    monkeypatch.setattr(memory, "of_worker", lambda config, pool: int(share * size))
    pool = Pool(on_gpus)
    prune(make_context(recorded, pool), until="apply")
    assert pool.asked == found
