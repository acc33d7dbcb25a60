"""One private Ray cluster for the whole folder, started by the code under test."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config_file import parse
from cria_dist.runtime.session import ray_session


@pytest.fixture(scope="package")
def session(run_tree: dict[str, Any]) -> Iterator[int]:
    """Two CPUs; yields the number of workers."""
    config = parse({**run_tree, "run": {"workers": 2}, "recover": {"workers": 2, "batch_sequences": 4}})
    with ray_session(config) as workers:
        yield workers


@pytest.fixture(scope="session")
def write_toml() -> Callable[[Path, dict[str, Any]], Path]:
    """Write a run configuration as a TOML file."""

    def write(path: Path, tree: dict[str, Any]) -> Path:
        path.write_text(_toml(tree), encoding="utf-8")
        return path

    return write


def _toml(tree: dict[str, Any]) -> str:
    """The few kinds of values a run configuration has, as TOML."""
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict) and key != "compare"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    lines += [f"compare = [{', '.join(_inline(one) for one in tree.get('compare', []))}]"]
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{name} = {_inline(item)}" for name, item in value.items())]
    return "\n".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)
