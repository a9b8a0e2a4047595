"""The API as it is deployed, in a process of its own on a real port, for clients that are programs."""

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from backend.dev import leash


@contextmanager
def serving(empty: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Serve the API with these settings until the end; its address.

    empty: a working directory without a `.env`.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        process = subprocess.Popen(
            leash.arguments([sys.executable, "-m", "backend.cli", "serve", "--fd", str(listener.fileno())], grace=5),
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={"PATH": os.environ["PATH"], **environment},
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        try:
            # The socket listens already, so that this waits for the first answer.
            with closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
                connection.request("GET", "/livez")
                assert connection.getresponse().status == 200
            yield f"http://{host}:{port}"
        finally:
            process.communicate()
