"""Serves the test issuer's keys over HTTP on loopback."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from backend.auth.testing import LocalIssuer

AUDIENCE = "http://localhost:8000"
LIFETIME = 3600  # seconds, the longest lifetime accepted; a whole benchmark takes less


@contextmanager
def serve_keys(issuer: LocalIssuer) -> Iterator[str]:
    """Serve the issuer's current key set while the context lasts; yields its URL."""

    class Keys(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # name required by http.server
            body = json.dumps(issuer.jwks).encode()
            with suppress(ConnectionError):  # a process that has ended no longer reads
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Keys) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/jwks"
        finally:
            server.shutdown()
            thread.join()
