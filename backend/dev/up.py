"""The whole system on one machine: PostgreSQL, Better Auth and the API start together and end together."""

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

from backend.dev import leash
from backend.dev.issuer import Issuer
from backend.dev.postgres import EmbeddedPostgres
from backend.dev.web import build
from backend.settings import Settings

_PACKAGE = Path(__file__).resolve().parents[1]
_LOOK_FOR_CHANGES = 0.5  # seconds
_ANSWER_WITHIN = 60.0  # seconds
_SECURITY_EVENTS = "/api/v1/security-events"


class DevError(Exception):
    """What keeps the system from starting, in one line."""


class _Stopped(BaseException):
    """Somebody asked for the end."""


class _Event(NamedTuple):
    """A part has ended, with an exit code; or, with none, it answers."""

    part: str
    process: object
    code: int | None


def up(
    *,
    port: int,
    issuer_port: int,
    data_dir: Path,
    settings: Settings,
    say: Callable[[str], None],
    web: bool = False,
) -> int:
    """Run everything until somebody stops it. The exit code: 0 when asked to end, 1 when a part ended by itself.

    port, issuer_port: 0 for any free one.
    data_dir: kept from one run to the next.
    settings: with a `database_url` no PostgreSQL starts; with a `better_auth_url` of one's own, no issuer.
    say: is given each line for the person at the terminal.
    web: whether the web app is the issuer.

    Raises DevError, EmbeddedPostgresError, IssuerError.
    """
    try:
        with _signals_stop(), ExitStack() as parts:
            own_issuer = "better_auth_url" in settings.model_fields_set
            if web and own_issuer:
                raise DevError("BETTER_AUTH_URL is set, and the web app is an issuer of its own: unset it")
            listener = parts.enter_context(_listen(port, "--port"))
            issuer = None if own_issuer else Issuer(data_dir=data_dir / "issuer", web=web)
            if issuer:
                with _listen(issuer_port, "--issuer-port") as free:
                    issuer.port = free.getsockname()[1]
            if web:
                build(say)
            return _run(parts, listener, issuer, data_dir, settings, say)
    except _Stopped:
        say("\nstopped")
        return 0


def _run(
    parts: ExitStack,
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
        parts.callback(issuer.close)
        issuer_starts = parts.enter_context(ThreadPoolExecutor(1)).submit(issuer.start)
    database = settings.database_url
    if not database:
        postgres = parts.enter_context(EmbeddedPostgres(data_dir / "postgres"))
        database = environment["DATABASE_URL"] = environment["DATABASE_DIRECT_URL"] = postgres.url
        _watch(events, "PostgreSQL", None, postgres.wait)
    _migrate(environment)
    if issuer:
        issuer_starts.result()
        environment["BETTER_AUTH_URL"] = issuer.url
        if issuer.web:
            # The browser speaks to the API from the app's pages, under whichever name the person opened them.
            pages = (issuer.url, f"http://127.0.0.1:{issuer.port}")
            environment["CORS_ORIGINS"] = ",".join(dict.fromkeys([*settings.cors_origins, *pages]))
        _watch(events, "the web app" if issuer.web else "the issuer", None, issuer.wait)

    api = _Api(listener, environment, events)
    parts.callback(api.stop)
    api.start()
    seen, answered, reloaded = _sources(), False, False
    while True:
        try:
            event = events.get(timeout=_LOOK_FOR_CHANGES)
        except Empty:
            if (now := _sources()) != seen:
                say(f"reload: {', '.join(sorted({path for path, _ in now ^ seen}))}")
                seen, answered, reloaded = now, False, True
                api.stop()
                api.start()
            continue
        if event.process not in (None, api.process):
            continue  # the one that a reload has replaced
        if event.code is None:
            if not reloaded:
                say(_welcome(port, settings, issuer, database, data_dir))
            answered = True
        elif event.process and reloaded and not answered:
            say("the API does not start: waiting for the next change")
        else:
            say(f"{event.part} ended by itself (exit code {event.code}): everything stops")
            return 1


class _Api:
    """The API's process. It inherits the listening socket, so that a reload lets callers wait and refuses none."""

    def __init__(self, listener: socket.socket, environment: Mapping[str, str], events: "SimpleQueue[_Event]") -> None:
        self._listener = listener
        self._environment = {**os.environ, **environment}
        self._events = events
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        fd = self._listener.fileno()
        process = self.process = subprocess.Popen(  # noqa: S603 - our own program and words
            leash.arguments([sys.executable, "-m", "backend.cli", "serve", "--fd", str(fd)], grace=5),
            stdin=subprocess.PIPE,
            env=self._environment,
            pass_fds=[fd],
            start_new_session=True,
        )
        _watch(self._events, "the API", process, process.wait)
        _watch(self._events, "the API", process, self._await_answer)

    def stop(self) -> None:
        """Let requests in flight finish, for five seconds at most."""
        if self.process:
            self.process.communicate()

    def _await_answer(self) -> None:
        host, port = self._listener.getsockname()
        connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_WITHIN)
        try:
            connection.request("GET", "/livez")
            connection.getresponse()
        finally:
            connection.close()


def _watch(events: "SimpleQueue[_Event]", part: str, process: object, wait: Callable[[], int | None]) -> None:
    """Tell `events` when `wait` returns: what it waited for has ended with that code, or answers."""

    def run() -> None:
        with suppress(OSError):  # no answer: then the end of the process is told
            events.put(_Event(part, process, wait()))

    threading.Thread(target=run, daemon=True).start()


def _migrate(environment: Mapping[str, str]) -> None:
    """In a process of its own, which takes the migrations' weight with it when it ends."""
    command = [sys.executable, "-m", "backend.cli", "migrate"]
    done = subprocess.run(  # noqa: S603 - our own program and words
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DevError(f"the migrations failed: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")


def _listen(port: int, option: str) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise DevError(f"port {port} is not free ({error.strerror}): take another with {option}") from error
    return listener


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Make Ctrl-C, a plain `kill` and a closed terminal raise _Stopped, once: what follows is bounded in time."""
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
        "PostgreSQL": "yours, by DATABASE_URL" if settings.database_url else database,
        "Data": f"{data_dir}/ is kept; delete it to start afresh" if issuer or not settings.database_url else "yours",
        "Try": f'curl -s {address}/api/v1/tasks -H "Authorization: Bearer {bearer}"',
        "Stop": "Ctrl-C",
    }
    if issuer and issuer.web:
        lines = {"Open": issuer.url} | lines | {"Better Auth": f"{issuer.base_url} (in the web app)"}
    if not issuer:
        lines["Try"] += "  # with a JWT of your Better Auth in TOKEN"
    return "\n".join(["", *(f"  {name:12} {text}" for name, text in lines.items()), ""])
