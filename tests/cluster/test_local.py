"""The cluster for trying out: several nodes behind a token, gone when it is told to end."""

import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cria_dist.runtime.submit import connect

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def test_it_says_how_to_use_it_and_leaves_nothing_behind(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = [sys.executable, str(repository / "cluster" / "local.py"), "--nodes", "1", "--gpus", "1"]
    log = tmp_path / "stderr"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            said = "".join(process.stdout.readline() for _ in range(3))
            assert "cria submit prune " in said, log.read_text()
            exports = dict(re.findall(r"^export (\w+)=(\S+)$", said, re.MULTILINE))
            token, address = Path(exports["RAY_AUTH_TOKEN_PATH"]), exports["RAY_API_SERVER_ADDRESS"]
            assert address.startswith("http://127.0.0.1:")
            assert token.stat().st_mode & 0o777 == 0o600
            started = psutil.Process(process.pid).children(recursive=True)
            ports = [one.laddr for each in started for one in each.net_connections("tcp") if one.status == "LISTEN"]
            assert len(ports) > 6
            assert {address.ip.removeprefix("::ffff:") for address in ports} == {"127.0.0.1"}
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{address}/api/jobs/", timeout=30)
            monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
            assert connect(address).list_jobs() == []
        finally:
            process.terminate()
        assert process.wait(timeout=60) == 0
    assert not token.exists()
