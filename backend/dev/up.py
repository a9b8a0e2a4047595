"""Runs PostgreSQL, Better Auth and the API together on one machine, for development."""

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import NamedTuple

from backend.dev import parent_watchdog
from backend.dev.issuer import Issuer
from backend.dev.postgres import EmbeddedPostgres
from backend.dev.web import build
from backend.settings import Settings

_PACKAGE = Path(__file__).resolve().parents[1]
_RELOAD_INTERVAL = 0.5  # seconds
_START_TIMEOUT = 60.0  # seconds
_SECURITY_EVENTS = "/api/v1/security-events"


class DevError(Exception):
    """The system cannot start. The message gives the reason in one line."""


class _Stopped(BaseException):
    """A signal asked this process to stop."""


class _Event(NamedTuple):
    """A component has ended or has become ready."""

    component: str
    process: object
    code: int | None
    """The exit code; None: the component is ready."""


def up(
    *,
    port: int,
    issuer_port: int,
    data_dir: Path,
    settings: Settings,
    say: Callable[[str], None],
    web: bool = False,
) -> int:
    """Run all components until a signal stops them. Return the exit code: 0 after a signal, 1 if a component ended.

    port, issuer_port: 0 for any free port.
    data_dir: kept between runs.
    settings: if they set `database_url`, no PostgreSQL starts; if they set `better_auth_url`, no issuer.
    say: prints a line at the terminal.
    web: run the web app, which contains the issuer.

    Raises DevError, EmbeddedPostgresError, IssuerError.
    """
    try:
        with _stop_on_signals(), ExitStack() as stack:
            own_issuer = "better_auth_url" in settings.model_fields_set
            if web and own_issuer:
                raise DevError("BETTER_AUTH_URL is set, but the web app contains its own issuer: unset it")
            listener = stack.enter_context(_listen(port, "--port"))
            issuer = None if own_issuer else Issuer(data_dir=data_dir / "issuer", web=web)
            if issuer:
                with _listen(issuer_port, "--issuer-port") as free:
                    issuer.port = free.getsockname()[1]
            if web:
                build(say)
            return _run(stack, listener, issuer, data_dir, settings, say)
    except _Stopped:
        say("\nstopped")
        return 0


def _run(
    stack: ExitStack,
    listener: socket.socket,
    issuer: Issuer | None,
    data_dir: Path,
    settings: Settings,
    say: Callable[[str], None],
) -> int:
    events: SimpleQueue[_Event] = SimpleQueue()
    port = listener.getsockname()[1]
    public_url = settings.public_url if "public_url" in settings.model_fields_set else f"http://localhost:{port}"
    environment = {"PUBLIC_URL": public_url, "DRAIN_SECONDS": "0"}
    if issuer:
        issuer.api_url = f"http://127.0.0.1:{port}"
        issuer.security_events = f"{issuer.api_url}{_SECURITY_EVENTS}"
        issuer.security_events_audience = settings.security_events_audience or f"{public_url}{_SECURITY_EVENTS}"
        stack.callback(issuer.close)
        issuer_starts = stack.enter_context(ThreadPoolExecutor(1)).submit(issuer.start)
    database = settings.database_url
    if not database:
        postgres = stack.enter_context(EmbeddedPostgres(data_dir / "postgres"))
        database = environment["DATABASE_URL"] = environment["DATABASE_DIRECT_URL"] = postgres.url
        _watch(events, "PostgreSQL", None, postgres.wait)
    _migrate(environment)
    if issuer:
        issuer_starts.result()
        environment["BETTER_AUTH_URL"] = issuer.url
        if issuer.web:
            # The user may open the app's pages under either name, and both origins call the API.
            pages = (issuer.url, f"http://127.0.0.1:{issuer.port}")
            environment["CORS_ORIGINS"] = ",".join(dict.fromkeys([*settings.cors_origins, *pages]))
        _watch(events, "the web app" if issuer.web else "the issuer", None, issuer.wait)

    api = _Api(listener, environment, events)
    stack.callback(api.stop)
    api.start()
    sources, ready, reloaded = _sources(), False, False
    while True:
        try:
            event = events.get(timeout=_RELOAD_INTERVAL)
        except Empty:
            if (now := _sources()) != sources:
                say(f"reload: {', '.join(sorted({path for path, _ in now ^ sources}))}")
                sources, ready, reloaded = now, False, True
                api.stop()
                api.start()
            continue
        if event.process not in (None, api.process):
            continue  # from a process that a reload has replaced
        if event.code is None:
            if not reloaded:
                say(_welcome(port, settings, issuer, database, data_dir))
            ready = True
        elif event.process and reloaded and not ready:
            say("the API failed to start; it will restart when a file changes")
        else:
            say(f"{event.component} ended unexpectedly (exit code {event.code}): stopping all components")
            return 1


class _Api:
    """The API's process. It inherits the listening socket, so that requests during a reload wait and none fails."""

    def __init__(self, listener: socket.socket, environment: Mapping[str, str], events: "SimpleQueue[_Event]") -> None:
        self._listener = listener
        self._environment = {**os.environ, **environment}
        self._events = events
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        fd = self._listener.fileno()
        process = self.process = subprocess.Popen(  # noqa: S603 - fixed program and arguments
            parent_watchdog.arguments([sys.executable, "-m", "backend.cli", "serve", "--fd", str(fd)], grace=5),
            stdin=subprocess.PIPE,
            env=self._environment,
            pass_fds=[fd],
            start_new_session=True,
        )
        _watch(self._events, "the API", process, process.wait)
        _watch(self._events, "the API", process, self._await_ready)

    def stop(self) -> None:
        """Stop the process; requests in progress have 5 s to finish."""
        if self.process:
            self.process.communicate()

    def _await_ready(self) -> None:
        host, port = self._listener.getsockname()
        connection = http.client.HTTPConnection(host, port, timeout=_START_TIMEOUT)
        try:
            connection.request("GET", "/livez")
            connection.getresponse()
        finally:
            connection.close()


def _watch(events: "SimpleQueue[_Event]", component: str, process: object, wait: Callable[[], int | None]) -> None:
    """Put an event into `events` when `wait` returns: an exit code, or None when the component is ready."""

    def run() -> None:
        with suppress(OSError):  # no response; the watcher of the process reports its end
            events.put(_Event(component, process, wait()))

    threading.Thread(target=run, daemon=True).start()


def _migrate(environment: Mapping[str, str]) -> None:
    """Run the migrations in a child process, so that their libraries do not stay in this process's memory."""
    command = [sys.executable, "-m", "backend.cli", "migrate"]
    done = subprocess.run(  # noqa: S603 - fixed program and arguments
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DevError(f"the migrations failed: {(done.stderr.strip() or 'no error output').splitlines()[-1]}")


def _listen(port: int, option: str) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise DevError(f"port {port} is in use ({error.strerror}): choose another with {option}") from error
    return listener


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Raise _Stopped on SIGINT, SIGTERM or SIGHUP, and ignore further ones: the shutdown is bounded in time."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(_: int, __: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise _Stopped

    earlier = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _sources() -> frozenset[tuple[str, int]]:
    found = set()
    for folder, _, names in os.walk(_PACKAGE):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                found.add((str(path.relative_to(_PACKAGE.parent)), path.stat().st_mtime_ns))
    return frozenset(found)


def _welcome(port: int, settings: Settings, issuer: Issuer | None, database: str, data_dir: Path) -> str:
    address = f"http://127.0.0.1:{port}"
    program = os.path.relpath(Path(sys.executable).with_name("resource-server"))
    if issuer:
        default = issuer.url == Settings.model_fields["better_auth_url"].default
        bearer = f"$({'' if default else f'BETTER_AUTH_URL={issuer.url} '}{shlex.quote(program)} token)"
    else:
        bearer = "$TOKEN"
    lines = {
        "API": f"{address} (documentation: {address}/docs)",
        "Better Auth": f"{issuer.url} (the reference issuer)" if issuer else f"{settings.better_auth_url} (yours)",
        "PostgreSQL": "yours (DATABASE_URL)" if settings.database_url else database,
        "Data": f"{data_dir}/ (delete it to start with empty data)" if issuer or not settings.database_url else "yours",
        "Try": f'curl -s {address}/api/v1/users/me -H "Authorization: Bearer {bearer}"',
        "Stop": "Ctrl-C",
    }
    if issuer and issuer.web:
        lines = {"Open": issuer.url} | lines | {"Better Auth": f"{issuer.base_url} (in the web app)"}
    if not issuer:
        lines["Try"] += "  # with a JWT of your Better Auth in TOKEN"
    return "\n".join(["", *(f"  {name:12} {text}" for name, text in lines.items()), ""])
