"""The way it is used on a cluster: submitted as a job, logs in plain lines."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]

REPOSITORY = Path(__file__).parents[2]


def _submit(arguments: list[str]) -> tuple[JobStatus, str]:
    client = JobSubmissionClient(f"http://{ray.worker._global_node.address_info['webui_url']}")
    command = shlex.join([sys.executable, "-m", "jobs.decide", *arguments])
    job = client.submit_job(entrypoint=f"cd {shlex.quote(str(REPOSITORY))} && {command}")
    deadline = time.monotonic() + 240
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    return status, client.get_job_logs(job)


def test_a_submitted_job_runs_on_its_cluster_and_logs_plain_lines(
    run_tree: dict[str, Any], write_toml: Callable[[Path, dict[str, Any]], Path], finished_run: Any, tmp_path: Path
) -> None:
    path = write_toml(tmp_path / "run.toml", {**run_tree, "run": {"root": str(tmp_path / "runs")}})
    status, logs = _submit([str(path)])
    assert status is JobStatus.SUCCEEDED, logs
    assert "workers: 2 Ray workers" in logs
    assert "record 3/3 shards in" in logs
    assert "\x1b[" not in logs
    [plan] = (tmp_path / "runs").glob("*/round-00/plan.json")
    assert plan.read_bytes() == (finished_run.folder / "round-00/plan.json").read_bytes()


def test_a_user_error_fails_the_job_with_one_line(tmp_path: Path) -> None:
    status, logs = _submit([str(tmp_path / "missing.toml")])
    assert status is JobStatus.FAILED
    errors = [line for line in logs.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "missing.toml" in errors[0]
