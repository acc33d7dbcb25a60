"""Losses measured by Ray workers choose what losses measured in this process choose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.pipeline import prune
from cria_dist.pool import LocalPool, Pool
from cria_dist.runtime.pool import RayPool

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]


def test_two_workers_choose_what_one_process_chooses(
    run_config: Callable[..., RunConfig], make_context: Callable[..., Any], session: int, tmp_path: Path
) -> None:
    written: dict[str, list[bytes]] = {}
    pools: dict[str, Pool] = {"local": LocalPool(), "ray": RayPool(session)}
    for name, pool in pools.items():
        changes = {"ratio": 0.25, "multiple": 4, "allocation": "sensitivity"}
        context = make_context(run_config(tmp_path / name, method={"name": "magnitude"}, prune=changes), pool, "decide")
        prune(context, until="decide")
        folder = context.job.folder / "round-00"
        written[name] = [(folder / file).read_bytes() for file in ("plan.json", "allocation.json")]
        written[name] += [path.read_bytes() for path in sorted((folder / "sensitivity").iterdir())]
    pools["ray"].release()
    assert len(written["local"]) == 2 + 2 + 3
    assert written["ray"] == written["local"]
