"""What every node must see, before anything is computed: other nodes are made up, for here they see the same files."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cria_dist import config_file
from cria_dist.errors import ConfigError
from cria_dist.runtime import launch, shared, sweep
from cria_dist.stages.sweep import plan


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Names that a node does not see, by node; filled by the test."""
    blind: dict[str, set[str]] = {}

    def ask(paths: Sequence[str]) -> dict[str, list[str]]:
        assert shared.absent_of(paths) == [], "all of it is here"
        return {node: [path for path in paths if Path(path).parent.name in names] for node, names in blind.items()}

    monkeypatch.setattr(shared, "_ask", ask)
    return blind


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a run folder."""
    model, folder = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    folder.mkdir()
    (model / "config.json").write_text("{}")
    return model, folder


def test_nodes_that_see_everything(answers: dict[str, set[str]], places: tuple[Path, Path]) -> None:
    answers |= {"10.0.0.1": set(), "10.0.0.2": {"elsewhere"}}
    shared.check_shared(*places)
    assert os.listdir(places[1]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "model.path is {} here, which node 10.0.0.2 does not see; put it on storage that all nodes see"),
        ("run", "node 10.0.0.2 does not see the run folder {}; set run.root to a folder that all nodes share"),
    ],
)
def test_a_node_that_does_not_see_it_is_named(
    answers: dict[str, set[str]], places: tuple[Path, Path], name: str, message: str
) -> None:
    answers |= {"10.0.0.1": set(), "10.0.0.2": {name}}
    with pytest.raises(ConfigError, match=re.escape(message.format(places[0].parent / name))):
        shared.check_shared(*places)
    assert os.listdir(places[1]) == []


def test_a_path_is_absent_where_it_cannot_be_reached(tmp_path: Path) -> None:
    there, not_there = str(tmp_path), str(tmp_path / "not")
    assert shared.absent_of([there, not_there]) == [not_there]


def test_only_other_nodes_that_take_work_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def node(number: int, cpus: float = 4.0, alive: bool = True) -> dict[str, Any]:
        address = f"10.0.0.{number}"
        return {"NodeID": f"{number:056x}", "NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": cpus}}

    class Task:
        def __init__(self, node_id: str) -> None:
            self._number = int(node_id, 16)

        def remote(self, paths: Sequence[str]) -> int:
            asked.append(self._number)
            return self._number

    class Ray:
        remote = staticmethod(lambda scheduling_strategy, **_: lambda _: Task(scheduling_strategy.node_id))
        nodes = staticmethod(lambda: nodes)
        get_runtime_context = staticmethod(lambda: Ray)
        get_node_id = staticmethod(lambda: node(1)["NodeID"])
        wait = staticmethod(lambda answers, **_: (answers[:-1], answers[-1:]))
        get = staticmethod(lambda answer: [f"/not/on/{answer}"])

    monkeypatch.setattr(shared, "ray", Ray)
    nodes = [node(1), node(2, cpus=0.0), node(3, alive=False)]
    assert shared._ask(["/x"]) == {}
    nodes += [node(4), node(5), node(6)]  # the last one does not answer in time
    assert shared._ask(["/x"]) == {"10.0.0.4": ["/not/on/4"], "10.0.0.5": ["/not/on/5"]}
    assert asked == [4, 5, 6]


def test_runs_and_sweeps_look_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_tree: dict[str, Any], write_toml: Callable[..., Path]
) -> None:
    tree = {**run_tree, "run": {"root": str(tmp_path / "runs")}}
    path = write_toml(tmp_path / "run.toml", {**tree, "sweep": {"grid": {"prune": {"ratio": [0.25, 0.5]}}}})
    monkeypatch.setattr(shared, "_ask", lambda paths: {"10.0.0.2": list(paths)})
    for module in (launch, sweep):
        monkeypatch.setattr(module, "ray_session", lambda config: nullcontext(1))
    for run in (lambda: launch.run(config_file.parse(tree)), lambda: sweep.run(plan(str(path)))):
        with pytest.raises(ConfigError, match=r"model\.path is .*, which node 10\.0\.0\.2 does not see"):
            run()
