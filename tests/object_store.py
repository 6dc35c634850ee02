"""A real S3 server on loopback, and a proxy in front of it that fails a share of the requests."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import pytest

BUCKET = "bucket"
KINDS = ("503", "500", "reset", "short body", "closed early", "slow")
_KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def server() -> Iterator[int]:
    """The port of a moto server that has a bucket."""
    pytest.importorskip("moto", reason="the S3 server of the tests: pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="pip install 'mmssl[s3]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        with settings(port):
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        yield port
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, "moto_server ended"
        time.sleep(0.1)
    raise TimeoutError("moto_server does not answer")


@contextlib.contextmanager
def settings(port: int) -> Iterator[None]:
    """Environment with which s3:// means the server at this port."""
    import fsspec

    wanted = {**_KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        fsspec.filesystem("s3").clear_instance_cache()


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a port, and fails `share` of them by turns in the ways of `KINDS`.

    Attributes:
        gets: GET requests that came in.
        failed: failures by kind.
    """

    daemon_threads = True

    def __init__(self, port: int, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.share = port, share
        self.gets = 0
        self.failed: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), Lock()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def fate(self, method: str) -> str:
        """How a request fails, "" if it does not."""
        with self._lock:
            self.gets += method == "GET"
            if self._random.random() >= self.share:
                return ""
            kinds = KINDS if method == "GET" else KINDS[:3]
            kind = kinds[sum(self.failed.values()) % len(kinds)]
            self.failed[kind] += 1
            return kind


@contextlib.contextmanager
def proxy(port: int, share: float, seed: int) -> Iterator[Proxy]:
    """A proxy at work."""
    with Proxy(port, share, seed) as found:
        Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield found
        found.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.fate(self.command)
        if fate.isdigit():
            self.send_response(int(fate))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fate == "reset":
            # no time to linger: the peer gets RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self._answer(sent, fate)

    def _answer(self, sent: bytes, fate: str) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, sent, dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        half = body[: len(body) // 2]
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = len(half) if fate == "short body" else len(body)
        if self.command == "HEAD":
            length = int(answer.headers.get("Content-Length", 0))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(half)
        if fate == "slow":
            time.sleep(0.5)
        if fate in ("short body", "closed early"):
            self.close_connection = True
        else:
            self.wfile.write(body[len(half) :])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
