"""Runs PostgreSQL, Better Auth and the API together on one machine, for development."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

from backend.dev import DevError
from backend.dev.api_process import ApiProcess, Event, reason, watch
from backend.dev.issuer import Issuer
from backend.dev.postgres import EmbeddedPostgres
from backend.dev.web import build
from backend.settings import Settings

_PACKAGE = Path(__file__).resolve().parents[1]
_RELOAD_INTERVAL = 0.5  # seconds
_SECURITY_EVENTS = "/api/v1/security-events"


class _Stopped(BaseException):
    """A signal asked this process to stop."""


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

    Raises DevError.
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
    events: SimpleQueue[Event] = SimpleQueue()
    port = listener.getsockname()[1]
    public_url = settings.public_url if "public_url" in settings.model_fields_set else f"http://localhost:{port}"
    environment = {"PUBLIC_URL": public_url, "DRAIN_SECONDS": "0"}
    if settings.log_format is None and sys.stderr.isatty():
        environment["LOG_FORMAT"] = "console"  # the API's own stderr is a pipe
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
        watch(events, "PostgreSQL", None, postgres.wait)
    _migrate(environment)
    if issuer:
        issuer_starts.result()
        environment["BETTER_AUTH_URL"] = issuer.url
        if issuer.web:
            # The user may open the app's pages under either name, and both origins call the API.
            pages = (issuer.url, f"http://127.0.0.1:{issuer.port}")
            environment["CORS_ORIGINS"] = ",".join(dict.fromkeys([*settings.cors_origins, *pages]))
        watch(events, "the web app" if issuer.web else "the issuer", None, issuer.wait)

    api = ApiProcess(listener, environment, events)
    stack.callback(api.stop)
    api.start()
    sources, is_ready, is_welcomed = _sources(), False, False
    while True:
        try:
            event = events.get(timeout=_RELOAD_INTERVAL)
        except Empty:
            if (now := _sources()) != sources:
                say(f"reload: {', '.join(sorted({path for path, _ in now ^ sources}))}")
                sources, is_ready = now, False
                api.stop()
                api.start()
            continue
        if event.process not in (None, api.process):
            continue  # from a process that a reload has replaced
        if event.code is None:
            if not is_welcomed:
                say(_welcome(port, settings, issuer, database, data_dir))
            is_ready = is_welcomed = True
        elif event.process and not is_ready:
            say(f"the API cannot start: {api.fail()}; it will restart when a file changes")
            if not settings.database_url:
                say(f"for commands in another terminal: export DATABASE_URL={shlex.quote(database)}")
        else:
            say(f"{event.component} ended unexpectedly (exit code {event.code}): stopping all components")
            return 1


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
        raise DevError(f"the migrations failed: {reason(done.stderr.splitlines())}")


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
            if name.endswith((".py", ".sql")):
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
