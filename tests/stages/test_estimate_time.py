"""How many workers an estimate reckons with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cria_dist import machine
from cria_dist.config import RunConfig
from cria_dist.stages.estimate_time import workers_assumed


def test_one_worker_per_cpu_that_this_process_may_use(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(machine, "cpus", lambda: 3)
    assert workers_assumed(run_config(tmp_path, run={"pool": "ray"})) == 3
    assert workers_assumed(run_config(tmp_path, run={"pool": "ray", "workers": 8})) == 8
