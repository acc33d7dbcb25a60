"""Three nodes, one of which is lost in every stage: the same manifest and plan as in one process, the same losses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.pipeline import prune
from cria_dist.stages.recover import read_log

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(600)]

PROCESS = Path(__file__).with_name("topology_process.py")


def test_a_node_lost_in_every_stage_changes_nothing(
    run_tree: dict[str, Any],
    make_model: Callable[..., Path],
    make_context: Callable[..., Any],
    run_config: Callable[..., Any],
    write_toml: Callable[[Path, dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {
        "model": {"path": str(make_model(tmp_path / "deep", num_hidden_layers=4))},
        "data": {**run_tree["data"], "calibration_sequences": 24},
        "record": {**run_tree["record"], "memory_gb": 1},
        "recover": {**run_tree["recover"], "steps": 150, "workers": 2, "checkpoint_every": 10, "distill": 0},
    }
    clean = make_context(run_config(tmp_path / "clean", **changes))
    prune(clean, until="recover")
    path = write_toml(tmp_path / "run.toml", {**run_tree, **changes, "run": {"root": str(tmp_path / "nodes")}})
    process = subprocess.run(
        [sys.executable, str(PROCESS), str(path)], capture_output=True, text=True, timeout=500, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["lost"] == ["Recorder", "Analyst", "training"]
    assert process.stderr.count("was lost") >= 2, "no worker had an item in hand"
    ours, theirs = Path(found["folder"]), clean.job.folder
    for artefact in ("round-00/manifest.json", "round-00/plan.json", "pruned/model.safetensors"):
        assert (ours / artefact).read_bytes() == (theirs / artefact).read_bytes(), artefact
    losses = [[line["loss"] for line in read_log(next(f.glob("recover/loss-*.jsonl")))] for f in (ours, theirs)]
    assert len(losses[0]) == 150
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert (ours / "recovered" / "model.safetensors").is_file()
