"""Following a job whose dashboard comes and goes, with a client that fails as told."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import requests
from ray.job_submission import JobStatus

from cria_dist.errors import WorkerError
from cria_dist.runtime import submit

CALL = submit.Call("cria-prune-run", ("python",), Path())


class Dashboard:
    """A job that is submitted already and runs for some looks; its log breaks off after each line."""

    def __init__(self, looks: int, failures: dict[int, Exception]) -> None:
        self.looks, self.failures, self.asked = looks, failures, 0

    def list_jobs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(submission_id=CALL.submission_id(1), status=JobStatus.RUNNING)]

    def get_job_info(self, _: str) -> SimpleNamespace:
        self.asked += 1
        if self.asked in self.failures:
            raise self.failures[self.asked]
        status = JobStatus.RUNNING if self.asked <= self.looks else JobStatus.SUCCEEDED
        return SimpleNamespace(status=status, driver_exit_code=0, message="")

    def get_job_logs(self, _: str) -> str:
        return "".join(f"line {number}\n" for number in range(1, 10))

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for number in range(1, min(self.asked, 8) + 1):
            yield f"line {number}\n"
        raise aiohttp.ClientConnectionError("dropped")


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Dashboard], int]:
    monkeypatch.setattr(submit, "RECONNECT_SECONDS", 0.01)

    def follow(dashboard: Dashboard) -> int:
        monkeypatch.setattr(submit, "connect", lambda _: dashboard)
        return submit.submit(CALL, "http://127.0.0.1:1")

    return follow


@pytest.mark.parametrize(
    "failure",
    [requests.exceptions.ConnectionError("refused"), RuntimeError("Request failed with status code 503: upstream")],
    ids=["a port that is forwarded anew", "an ingress without a dashboard"],
)
def test_a_dashboard_that_comes_back_is_asked_again(
    failure: Exception, follow: Callable[[Dashboard], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(Dashboard(4, {2: failure, 3: failure})) == 0
    assert capsys.readouterr().out == "".join(f"line {number}\n" for number in range(1, 10))


def test_what_came_after_the_break_is_shown_too(
    follow: Callable[[Dashboard], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The connection is lost as the job ends: its last lines hold the result."""
    assert follow(Dashboard(1, {})) == 0
    assert capsys.readouterr().out.endswith("line 9\n")


def test_a_dashboard_that_stays_away_is_one_error(
    follow: Callable[[Dashboard], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "AGENT_SECONDS", 0.05)
    gone = dict.fromkeys(range(2, 1000), RuntimeError("Request failed with status code 502"))
    with pytest.raises(WorkerError, match=r"the cluster at http://127\.0\.0\.1:1 does not answer any more .*502"):
        follow(Dashboard(1, gone))
