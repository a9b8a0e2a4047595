"""The API's process during development, and what answers at its address while it cannot start."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import NamedTuple

from backend.dev import parent_watchdog

_START_TIMEOUT = 60.0  # seconds
_LARGEST_BODY = 1024 * 1024  # bytes
_MOST_LINES = 1000  # kept for the reason; the traceback of a migration has more than 100
_LAST_OF_UVICORN = "Application startup failed. Exiting."  # it follows the reason
_TRACEBACK = "Traceback (most recent call last):\n"
_CONSOLE = re.compile(r"\d\d:\d\d:\d\d [a-z]+ +")  # the start of a line of the log in the format `console`


class Event(NamedTuple):
    """A component has ended or has become ready."""

    component: str
    process: object
    code: int | None
    """The exit code; None: the component is ready."""


def watch(events: SimpleQueue[Event], component: str, process: object, wait: Callable[[], int | None]) -> None:
    """Put an event into `events` when `wait` returns: an exit code, or None when the component is ready."""

    def run() -> None:
        with suppress(OSError):  # no response; the watcher of the process reports its end
            events.put(Event(component, process, wait()))

    threading.Thread(target=run, daemon=True).start()


class ApiProcess:
    """It inherits the listening socket, so that requests during a reload wait and none fails."""

    def __init__(self, listener: socket.socket, environment: Mapping[str, str], events: SimpleQueue[Event]) -> None:
        self._listener = listener
        self._environment = {**os.environ, **environment}
        self._events = events
        self._last_lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._substitute: _Unavailable | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        fd = self._listener.fileno()
        command = [sys.executable, "-m", "backend.cli", "serve", "--migrate", "--fd", str(fd)]
        process = self.process = subprocess.Popen(  # noqa: S603 - fixed program and arguments
            parent_watchdog.arguments(command, grace=5),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            pass_fds=[fd],
            start_new_session=True,
        )
        self._last_lines = deque(maxlen=_MOST_LINES)
        reader = threading.Thread(target=_forward, args=(process, self._last_lines), daemon=True)
        reader.start()

        def wait() -> int:
            code = process.wait()
            reader.join()
            return code

        watch(self._events, "the API", process, wait)
        watch(self._events, "the API", process, self._await_ready)

    def stop(self) -> None:
        """Stop the process; requests in progress have 5 s to finish."""
        if self._substitute:
            self._substitute.stop()
            self._substitute = None
        if self.process:
            assert self.process.stdin
            self.process.stdin.close()
            self.process.wait()

    def fail(self) -> str:
        """Answer all requests with the reason why the process has ended, until the next start. Return the reason."""
        cause = reason(self._last_lines)
        self._substitute = _Unavailable(self._listener, cause)
        return cause

    def _await_ready(self) -> None:
        host, port = self._listener.getsockname()
        connection = http.client.HTTPConnection(host, port, timeout=_START_TIMEOUT)
        try:
            connection.request("GET", "/livez")
            if connection.getresponse().status != HTTPStatus.OK:
                raise ConnectionError("not an answer of the API")
        finally:
            connection.close()


def _forward(process: "subprocess.Popen[bytes]", last_lines: deque[str]) -> None:
    """Write the lines of a process to this one's standard error, and keep the last ones."""
    assert process.stderr
    with process.stderr as lines:
        for line in lines:
            last_lines.append(line.decode(errors="replace"))
            sys.stderr.write(last_lines[-1])
            sys.stderr.flush()


def reason(lines: Iterable[str]) -> str:
    """The last error that a process wrote: of a traceback, the first line of the message and the place in `backend`."""
    records = ["it wrote no error"]
    for line in filter(str.strip, lines):
        message = _logged(line)
        if message is None:
            records[-1] += f"\n{line.rstrip()}"
        elif message and message != _LAST_OF_UVICORN:
            records.append(message)
    trace = records[-1].rpartition(_TRACEBACK)[2]
    errors = re.findall(r"^(?: *\| )?([^\s|+].*)", trace, re.MULTILINE)  # with `|` in an exception group
    places = re.findall(r'^[ |]*File "(.+)", line (\d+)', trace, re.MULTILINE)
    if not (errors and places):
        return trace.splitlines()[-1].strip()
    paths = [(os.path.relpath(file), number) for file, number in places]
    own = [path for path in paths if path[0].startswith(f"backend{os.sep}")]
    file, number = (own or paths)[-1]
    return f"{errors[0]} ({file}, line {number})"


def _logged(line: str) -> str | None:
    """The message and traceback of a line of the log, or None for another line."""
    if found := _CONSOLE.match(line):
        return line[found.end() :].strip()
    with suppress(ValueError, TypeError, KeyError):
        record = json.loads(line)
        return f"{record['message']}\n{record.get('exception', '')}".strip()
    return None


class _Unavailable:
    """Answers 503 with a reason on a listening socket."""

    def __init__(self, listener: socket.socket, reason: str) -> None:
        body = {
            "type": "about:blank",
            "title": HTTPStatus.SERVICE_UNAVAILABLE.phrase,
            "status": HTTPStatus.SERVICE_UNAVAILABLE,
            "detail": f"The API cannot start: {reason}",
            "code": "unavailable",
            "request_id": None,
        }
        self._server = _Server(listener, json.dumps(body).encode())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    def __init__(self, listener: socket.socket, body: bytes) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener.dup()
        self.body = body


class _Handler(BaseHTTPRequestHandler):
    timeout = 5  # seconds
    server: _Server

    def answer(self) -> None:
        length = self.headers.get("Content-Length", "")
        if length.isdigit():  # a client that still sends its body would not read the response
            self.rfile.read(min(int(length), _LARGEST_BODY))
        self.send_response(HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", "application/problem+json")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.server.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815 - names of the server

    def log_message(self, *_: object) -> None:
        """The reason stands at the terminal already."""
