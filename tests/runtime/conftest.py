"""One private Ray cluster for the whole folder, started by the code under test."""

from collections.abc import Iterator
from typing import Any

import pytest

from cria_dist.config import parse
from cria_dist.runtime.session import ray_session


@pytest.fixture(scope="package")
def session(run_tree: dict[str, Any]) -> Iterator[int]:
    """Two CPUs; yields the number of workers."""
    config = parse({**run_tree, "run": {"workers": 2}, "recover": {"workers": 2, "batch_sequences": 4}})
    with ray_session(config) as workers:
        yield workers
