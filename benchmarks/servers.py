"""Starts and stops the servers under test."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from backend.dev import parent_watchdog
from benchmarks.errors import BenchmarkError
from benchmarks.peers import Peer
from benchmarks.workloads import Request, Workload

ROOT = Path(__file__).parents[1]
PATIENCE = 30.0  # seconds until a server must respond


class Server:
    """A running peer. `pid` is the root of its process tree."""

    def __init__(self, peer: Peer, port: int, pid: int) -> None:
        self.peer = peer
        self.pid = pid
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, request: Request) -> httpx.Response:
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as http:
            return http.request(request.method, request.path, headers=request.headers, content=request.body)

    def check(self, workload: Workload, request: Request) -> int:
        """The length of the response body. Raises BenchmarkError unless the response is what the workload expects."""
        answer = self.ask(request)
        if answer.status_code != workload.status or not workload.fits(answer.json()):
            raise BenchmarkError(
                f"{self.peer.name}: {workload.title}: {answer.status_code} {answer.text[:200]!r}, "
                f"expected {workload.status}"
            )
        return len(answer.content)


def environment(database_url: str, issuer: str, jwks_url: str, audience: str) -> dict[str, str]:
    """The environment of every server: this API's settings, with all optional middleware enabled."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": database_url,
        "DATABASE_POOL_SIZE": "10",
        "BETTER_AUTH_URL": issuer,
        "BETTER_AUTH_JWKS_URL": jwks_url,
        "PUBLIC_URL": audience,
        "CORS_ORIGINS": "https://app.example.com",
        "TRUSTED_HOSTS": "127.0.0.1",
        "RATE_LIMIT": "1000000000/minute",  # counted, and never reached
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "info",
    }


@contextmanager
def running(peer: Peer, variables: Mapping[str, str], *, show_log: bool = False) -> Iterator[Server]:
    """Start a peer, wait until it responds, and stop it at the end. Raises BenchmarkError.

    Its log on standard error goes to /dev/null, with `show_log` to this process's standard error. Its working
    directory is empty, so that it reads no `.env`.
    """
    port = _free_port()
    with TemporaryDirectory(prefix="benchmark-") as empty:
        process = subprocess.Popen(  # noqa: S603 - fixed program and arguments
            parent_watchdog.arguments(peer.command(port)),
            env=dict(variables),
            cwd=empty,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=sys.stderr if show_log else subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            server = Server(peer, port, process.pid)
            _await(server, process)
            yield server
        finally:
            process.communicate()  # closes standard input, at which the watchdog stops the server


def _await(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            server.ask(Request("GET", "/", {}))
        except httpx.TransportError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"{server.peer.name} did not start: --verbose shows its log") from error
            time.sleep(0.05)
        else:
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
