"""A small recording, and moto's S3 server in a process of its own behind a proxy that can be told to fail."""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cria_dist.records import Site
from cria_dist.store.activations import SignalTable
from cria_dist.store.recording import Recording, Slice
from cria_dist.store.storage import Storage

SITES = (Site(0), Site(1))
N = 4
ROWS = 3
SHARDS = 3
WHOLE = (Slice(0, N),)
HALVES = (Slice(0, 2), Slice(2, N))


def signals_of(site: Site, shard: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((site.layer, shard))
    return {name: rng.normal(size=(ROWS, N)).astype(np.float32) for name in ("gate", "up", "output")}


def write_shard(recording: Recording, site: Site, shard: int, slices: tuple[Slice, ...] = WHOLE) -> None:
    signals = signals_of(site, shard)
    tokens = {"sequence": np.full(ROWS, shard, np.int32), "position": np.arange(ROWS, dtype=np.int32)}
    output, parts = signals["output"], []
    for units in slices:
        own = slice(units.start, units.stop)
        table = SignalTable({name: [words[:, own].copy()] for name, words in signals.items()}, tokens, "float32")
        sums = (ROWS, output[:, own].sum(axis=0), output[:, own].T @ output)
        parts.append(
            {
                "start": units.start,
                "stop": units.stop,
                "signals": recording.write_signals(site, shard, units, table),
                "moments": recording.write_moments(site, shard, units, sums),
            }
        )
    recording.commit(site, shard, N, "float32", parts)


def record(storage: Storage, digest: str = "d1", slices: tuple[Slice, ...] = WHOLE) -> Recording:
    """What a run does: nothing if it is complete, else what is not committed, then the manifest."""
    recording = Recording(storage, digest)
    if not recording.is_complete():
        committed = recording.committed()
        for shard in range(SHARDS):
            for site in SITES:
                if (site, shard) not in committed:
                    write_shard(recording, site, shard, slices)
        recording.write_manifest(SITES, SHARDS)
    return recording


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(port: int, method: str, path: str, body: bytes = b"") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.fixture(scope="session")
def moto_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of an S3 server with the bucket ``bucket``."""
    program = shutil.which("moto_server", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("moto_server is not on the path")
    port = free_port()
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                assert request(port, "PUT", "/bucket") == 200
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


Fault = Callable[[str, str, int], int | None]
"""Of method, path and number of the request with this method: status to answer instead of asking the store; 0 hangs
up in the middle of the upload."""


@dataclass
class Proxy:
    """Stands before the store. ``requests`` are (method, path) as they came."""

    port: int
    fault: Fault = lambda _method, _path, _number: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def url(self, prefix: str) -> str:
        return f"s3://bucket/{prefix}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy
    store_port: int


class Handler(BaseHTTPRequestHandler):
    """Passes requests on; the server it belongs to knows the proxy and the port of the store."""

    protocol_version = "HTTP/1.1"

    server: Server

    def answer(self) -> None:
        self.server.proxy.requests.append((self.command, self.path))
        number = sum(method == self.command for method, _ in self.server.proxy.requests)
        status = self.server.proxy.fault(self.command, self.path, number)
        if status == 0:
            self.rfile.read(1 << 20)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.body()
        if status is not None:
            self.reply(status, {}, b"")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.store_port, timeout=30)
        dropped = ("content-length", "transfer-encoding", "expect", "connection")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        self.reply(response.status, dict(response.getheaders()), response.read())
        upstream.close()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def s3(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = Server(("127.0.0.1", 0), Handler)
    proxy = server.proxy = Proxy(server.server_port)
    server.store_port = moto_port

    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield proxy
    server.shutdown()
    thread.join()
    server.server_close()


class Toy:
    """A recording of 2 sites of 4 units, 3 shards of 3 sampled tokens; its content depends on ids only."""

    sites, shards, rows, width = SITES, SHARDS, ROWS, N
    halves = HALVES
    record = staticmethod(record)
    write_shard = staticmethod(write_shard)
    signals_of = staticmethod(signals_of)


@pytest.fixture
def toy() -> Toy:
    return Toy()
