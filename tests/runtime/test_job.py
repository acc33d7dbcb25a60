"""The way it is used on a cluster: `cria submit`, a real job behind a token, logs in plain lines."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient
from typer.testing import CliRunner, Result

from cria_dist import cli
from cria_dist.config import RunConfig
from cria_dist.pipeline import prune
from cria_dist.runtime.submit import connect, read_token

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session"), pytest.mark.timeout(600)]


@pytest.fixture
def address() -> str:
    return f"http://{ray.worker._global_node.address_info['webui_url']}"


@pytest.fixture
def client(address: str) -> JobSubmissionClient:
    return connect(address)


@pytest.fixture
def config(run_tree: dict[str, Any], write_toml: Callable[[Path, dict[str, Any]], Path], tmp_path: Path) -> Path:
    """The pico run with a run folder that a job can reach, named after the test (submission ids are for ever)."""
    tree = {**run_tree, "name": tmp_path.name[:48], "run": {"root": str(tmp_path / "runs")}}
    folder = tmp_path / "work"
    folder.mkdir()
    return write_toml(folder / "run.toml", tree)


def command(address: str, *arguments: str) -> list[str]:
    return ["submit", "--address", address, "--python", sys.executable, *arguments]


def submit(address: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, command(address, *arguments))


def start(address: str, *arguments: str) -> subprocess.Popen[str]:
    """The command of a user, in a process of its own."""
    whole = [sys.executable, "-m", "cria_dist", *command(address, *arguments)]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def jobs_of(client: JobSubmissionClient, config: Path) -> dict[str, JobStatus]:
    name = next(line for line in config.read_text().splitlines() if line.startswith("name")).split('"')[1]
    return {one.submission_id or "": one.status for one in client.list_jobs() if f"-{name}-" in str(one.submission_id)}


def test_the_same_command_twice_is_one_job_on_the_cluster(
    config: Path, address: str, client: JobSubmissionClient, finished_run: Any, tmp_path: Path
) -> None:
    first = submit(address, "decide", str(config))
    assert first.exit_code == 0, first.output
    assert "workers: 2 Ray workers" in first.stdout
    assert "record 3/3 shards in" in first.stdout
    assert "\x1b[" not in first.stdout
    [plan] = (tmp_path / "runs").glob("*/round-00/plan.json")
    assert plan.read_bytes() == (finished_run.folder / "round-00/plan.json").read_bytes()

    second = submit(address, "decide", str(config))
    assert (second.exit_code, second.stdout) == (0, first.stdout)
    assert "submitted before, succeeded; --again submits another attempt" in second.stderr
    [name] = jobs_of(client, config)
    assert name.startswith("cria-decide-")
    assert name.endswith("-1")

    details = client.get_job_info(name)
    assert set(details.runtime_env or {}) == {"working_dir", "excludes"}
    assert read_token() not in details.model_dump_json()
    assert read_token() not in first.output


def test_a_user_error_on_the_cluster_is_the_exit_code_and_one_line(config: Path, address: str) -> None:
    result = submit(address, "decide", str(config), "model.path=/no/such/model")
    assert result.exit_code == 2
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "/no/such/model" in errors[0]
    assert result.stderr.splitlines()[-1].startswith("cria-decide-")
    assert ": failed (" in result.stderr.splitlines()[-1]


def test_the_address_given_is_the_one_that_is_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would rather go where its environment says."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert connect(address).get_version()
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


def test_without_the_token_nothing_is_accepted(
    config: Path, address: str, client: JobSubmissionClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for method, body in (("GET", None), ("POST", b'{"entrypoint": "true"}')):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/api/jobs/", body, headers, method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 401
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    result = submit(address, "decide", str(config))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: the cluster at {address} refuses the token (")
    assert "0000" not in result.stderr
    monkeypatch.undo()
    assert jobs_of(client, config) == {}
    assert not (tmp_path / "runs").exists()


def test_a_stopped_job_is_no_success(config: Path, address: str, client: JobSubmissionClient) -> None:
    stopped = start(address, "record", str(config))
    wait_for(lambda: JobStatus.RUNNING in jobs_of(client, config).values(), stopped)
    [name] = jobs_of(client, config)
    client.stop_job(name)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode not in (0, 2), output
    assert f"{name}: stopped" in output


@pytest.mark.slow
@pytest.mark.soak
def test_the_next_attempt_goes_on_where_a_killed_driver_was(
    config: Path,
    address: str,
    client: JobSubmissionClient,
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Any],
    tmp_path: Path,
) -> None:
    clean = make_context(
        run_config(tmp_path / "clean", data={"calibration_sequences": 96}, record={"shard_sequences": 1})
    )
    prune(clean, until="record")
    arguments = ("record", str(config), "data.calibration_sequences=96", "record.shard_sequences=1")
    killed = start(address, *arguments)
    wait_for(lambda: len(list((tmp_path / "runs").glob("*/round-00/commits/*/*.json"))) >= 10, killed)
    driver_of(config).send_signal(signal.SIGKILL)
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode == 128 + signal.SIGKILL, output
    assert not list((tmp_path / "runs").rglob("manifest.json"))

    last = submit(address, *arguments)
    assert last.exit_code == 0, last.output
    assert "shards were recorded before" in last.stdout
    assert sorted(name[-1] for name in jobs_of(client, config)) == ["1", "2"]
    [manifest] = (tmp_path / "runs").rglob("manifest.json")
    assert manifest.read_bytes() == (clean.job.folder / "round-00/manifest.json").read_bytes()


def driver_of(config: Path) -> psutil.Process:
    """The process that runs the submitted command."""
    ours = [one for one in psutil.Process(os.getpid()).children(recursive=True) if "record" in one.cmdline()]
    [driver] = [one for one in ours if "submit" not in one.cmdline() and config.name in one.cmdline()]
    return driver
