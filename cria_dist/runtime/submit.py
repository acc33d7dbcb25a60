"""Runs as Ray jobs: the same command twice is one job, and one that failed or was stopped gets another attempt.

An attempt continues from what the one before left on storage, so the run folder must be one that all nodes see.
"""

import asyncio
import json
import logging
import os
import shlex
import stat
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cria_dist.errors import ConfigError, WorkerError

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

TOKEN_FILE = Path(".ray") / "auth_token"
ADDRESS = "RAY_API_SERVER_ADDRESS"
HIDDEN = ".?*"
"""What of the working directory stays here, at any depth: keys, tokens, caches. A plain ``.*`` would leave all of it
out, for Ray calls the folder itself ``.``."""
RECONNECT_SECONDS = 2.0
AGENT_SECONDS = 60.0
CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
"""Ray's loggers that tell of uploads and sockets."""
UNREACHABLE = (requests.exceptions.RequestException, aiohttp.ClientError, ConnectionError)


@dataclass(frozen=True, slots=True)
class Call:
    """What is sent to the cluster. Nothing in it is secret: it is shown in the dashboard.

    Attributes:
        name: submission id without the number of the attempt; equal calls have equal names.
        command: what the job runs, in the working directory.
        working_dir: local folder that travels with the job, but for what is hidden in it.
    """

    name: str
    command: tuple[str, ...]
    working_dir: Path

    def entrypoint(self) -> str:
        """The command as one line of shell."""
        return shlex.join(self.command)

    def submission_id(self, attempt: int) -> str:
        """Name of one attempt, counted from 1."""
        return f"{self.name}-{attempt}"

    def as_command(self, address: str) -> str:
        """The ``ray job submit`` line that does the same."""
        environment = self.environment()
        ours = ["--address", address, "--submission-id", self.submission_id(1)]
        ours += ["--working-dir", environment.pop("working_dir"), "--runtime-env-json", json.dumps(environment)]
        return shlex.join(["ray", "job", "submit", *ours, "--", *self.command])

    def environment(self) -> dict[str, Any]:
        """Ray's runtime_env."""
        return {"working_dir": str(self.working_dir), "excludes": [HIDDEN]}


def submit(call: Call, address: str, again: bool = False) -> int:
    """Submit a call, or join the job that it became before; show its log and wait for its end.

    Args:
        call: what to run.
        address: dashboard of the cluster, ``http://host:8265``.
        again: submit another attempt also when the last one succeeded.

    Returns:
        The exit code of the driver; 1 when it has none, 128 + n when signal n ended it.

    Raises:
        ConfigError: no cluster there, or it refuses the token.
        WorkerError: the cluster was lost.
    """
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    client = connect(address)
    try:
        job = _submit_or_join(client, call, again)
        details = asyncio.run(_follow(client, job))
    except (RuntimeError, *UNREACHABLE) as error:
        raise WorkerError(call.name, f"the cluster at {address} does not answer any more ({error})") from error
    sys.stderr.write(f"{job}: {details.status.value.lower()}{_reason(details)}\n")
    return exit_code(details)


def connect(address: str) -> JobSubmissionClient:
    """A client that shows the user's token.

    Raises:
        ConfigError: no token, no cluster there, or it refuses the token.
    """
    headers = {"Authorization": f"Bearer {read_token()}"}
    try:
        with _named(address):
            return JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} refuses the token ({str(error).splitlines()[0]}); set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's"
        ) from error
    except (*UNREACHABLE, RuntimeError) as error:
        raise ConfigError(
            f"no Ray dashboard at {address} ({error}); give --address, and forward its port if the cluster is elsewhere"
        ) from error


@contextmanager
def _named(address: str) -> Generator[None]:
    """Name the cluster where Ray looks before it looks at what it is given."""
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS]
        else:
            os.environ[ADDRESS] = before


def check_folder(folder: Path) -> None:
    """What travels is on every node, and whoever may use the cluster can read it.

    Args:
        folder: what is to travel, resolved.

    Raises:
        ConfigError: it is the user's home or around it, or the token is in it.
    """
    holds = "your home" if Path.home().resolve().is_relative_to(folder) else ""
    if (token := token_path().resolve()).is_file() and token.is_relative_to(folder):
        holds = f"the token {token}"
    if holds:
        raise ConfigError(
            f"the working directory {folder} would travel to the cluster, and it holds {holds}; put the configuration "
            "and its texts into a folder of their own"
        )


def token_path() -> Path:
    """Where the token's file is, if there is one."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / TOKEN_FILE)


def read_token() -> str:
    """The token, from where Ray looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        ConfigError: there is none, or others can read its file.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = token_path()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"no token for the cluster ({path}: {error}); set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"token file {path} has mode {mode:04o}, others can read it; run: chmod 600 {path}")
    return token


def exit_code(details: JobDetails) -> int:
    """What the shell would say of the driver."""
    code = details.driver_exit_code
    if details.status is JobStatus.SUCCEEDED:
        return 0
    return 1 if not code else code if code > 0 else 128 - code


def _submit_or_join(client: JobSubmissionClient, call: Call, again: bool) -> str:
    attempts = _attempts(client, call)
    if attempts:
        last, status = max(attempts.items())
        if not status.is_terminal() or (status is JobStatus.SUCCEEDED and not again):
            hint = "; --again submits another attempt" if status.is_terminal() else ""
            sys.stderr.write(f"{call.submission_id(last)}: submitted before, {status.value.lower()}{hint}\n")
            return call.submission_id(last)
    job = call.submission_id(max(attempts, default=0) + 1)
    sys.stderr.write(f"{job}: submitted\n")
    _send(client, call, job)
    return job


def _send(client: JobSubmissionClient, call: Call, job: str) -> None:
    """Submit under a name; the agent that starts jobs comes up later than the dashboard."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(entrypoint=call.entrypoint(), submission_id=job, runtime_env=call.environment())
        except RuntimeError as error:
            if "already exists" in str(error):
                return  # somebody was quicker with the same command
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ConfigError(f"{job} was not accepted: {error}") from error
            time.sleep(RECONNECT_SECONDS)
        else:
            return


def _attempts(client: JobSubmissionClient, call: Call) -> dict[int, JobStatus]:
    """State of the earlier attempts by number."""
    found: dict[int, JobStatus] = {}
    for details in client.list_jobs():
        name, _, number = (details.submission_id or "").rpartition("-")
        if name == call.name and number.isdecimal():
            found[int(number)] = details.status
    return found


async def _follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Show the log until the job ends; a lost connection is taken up where it was lost.

    Raises:
        ConnectionError, RuntimeError: the dashboard stays away for longer than a restart takes.
    """
    details = client.get_job_info(job)
    if details.status.is_terminal():
        sys.stdout.write(client.get_job_logs(job))
        return details
    shown = 0
    while True:
        seen, broken = 0, False
        try:
            async for text in client.tail_job_logs(job):
                sys.stdout.write(text[max(shown - seen, 0) :])
                sys.stdout.flush()
                seen += len(text)
                shown = max(shown, seen)
        except (RuntimeError, aiohttp.ClientError) as error:
            log.warning("%s: the log broke off (%s), looking again", job, error)
            broken = True
        details = await _patiently(client.get_job_info, job)
        if details.status.is_terminal():
            if broken:
                sys.stdout.write((await _patiently(client.get_job_logs, job))[shown:])
            return details
        await asyncio.sleep(RECONNECT_SECONDS)


async def _patiently(ask: Callable[[str], Answer], job: str) -> Answer:
    """Ask again while a dashboard, or what forwards its port, may be starting anew."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return ask(job)
        except (RuntimeError, *UNREACHABLE) as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s: the dashboard does not answer (%s), asking again", job, str(error).strip()[:200])
            await asyncio.sleep(RECONNECT_SECONDS)


def _reason(details: JobDetails) -> str:
    """Ray's word on why it did not succeed, in one line."""
    if details.status is JobStatus.SUCCEEDED or not details.message:
        return ""
    return f" ({details.message.strip().splitlines()[0]})"
