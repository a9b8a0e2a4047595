"""A pytest plugin: serves the API in a separate process on a real port."""

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from backend.dev import parent_watchdog
from backend.dev.issuer import Issuer
from backend.settings import Settings

COMMAND_LINE = "-m", "backend.cli"


@contextmanager
def serving(
    empty: Path, environment: Mapping[str, str], port: int = 0, program: Sequence[str] = COMMAND_LINE
) -> Iterator[str]:
    """Serve the API with these settings; yields its address.

    empty: a working directory without a `.env`.
    port: 0 for any free port.
    program: the arguments of Python that run the command line.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        host, port = listener.getsockname()
        process = subprocess.Popen(
            parent_watchdog.arguments([sys.executable, *program, "serve", "--fd", str(listener.fileno())], grace=5),
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={"PATH": os.environ["PATH"], "DRAIN_SECONDS": "0", **environment},
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        try:
            # The socket already listens, so this waits until the API responds.
            with closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
                connection.request("GET", "/livez")
                assert connection.getresponse().status == 200
            yield f"http://{host}:{port}"
        finally:
            process.communicate()


@pytest.fixture(scope="session")
def servers(
    better_auth: Issuer, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, str]]:
    """The addresses of the API and of the shared issuer: `API_URL`, `AUTH_URL`."""
    environment = {"DATABASE_URL": settings.database_url or "", "BETTER_AUTH_URL": better_auth.url, "RATE_LIMIT": "off"}
    with serving(tmp_path_factory.mktemp("api"), environment) as url:
        yield {"API_URL": url, "AUTH_URL": better_auth.base_url}
