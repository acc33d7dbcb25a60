"""What every node of a cluster must see: workers are given paths, of the model and into the run folder."""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cria_dist.errors import ConfigError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""A node that takes longer than this to look is not waited for; the pool replaces workers that cannot work."""


def check_shared(model_dir: Path, folder: Path) -> None:
    """Look on all other nodes that take work, before anything is computed. Nodes that come later are not asked.

    Args:
        model_dir: the dense checkpoint, where this process found or put it.
        folder: the run folder; a file that is made in it for this must appear on the others.

    Raises:
        ConfigError: a node does not have the model, or has another folder under the run folder's name.
    """
    config = model_dir / "config.json"
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as mark:
        answers = _ask([str(config), mark.name])
    for node, absent in answers.items():
        if str(config) in absent:
            raise ConfigError(
                f"model.path is {model_dir} here, which node {node} does not see; put it on storage that all nodes "
                "see: a directory there, or the cache of hub names (HF_HOME) and builtin: models (CRIA_CACHE)"
            )
        if absent:
            raise ConfigError(
                f"node {node} does not see the run folder {folder}; set run.root to a folder that all nodes share"
            )


def _ask(paths: Sequence[str]) -> dict[str, list[str]]:
    """Which of the paths are not there, by the address of the node, for every other node that takes work."""
    here = ray.get_runtime_context().get_node_id()
    asked: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU"):
            place: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(absent_of)
            asked[look.remote(paths)] = node["NodeManagerAddress"]
    if not asked:
        return {}
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    found: dict[str, list[str]] = {}
    for answer in answered:
        try:
            found[asked[answer]] = ray.get(answer)
        except RayError as error:
            log.warning("node %s could not look for the model: %s", asked[answer], error)
    for answer in late:
        log.warning("node %s did not say in %.0f s whether it sees the model", asked[answer], ANSWER_SECONDS)
    return found


def absent_of(paths: Sequence[str]) -> list[str]:
    """Those of the paths that do not exist in this process's eyes."""
    return [path for path in paths if not os.access(path, os.F_OK)]
