"""What every request carries and leaves behind: a request id, safe headers, one line in the log."""

import asyncio
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable
from contextvars import Context, copy_context
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TextIO

import orjson
from opentelemetry.trace import ProxyTracerProvider, format_trace_id, get_current_span, get_tracer_provider
from starlette.types import ASGIApp, Message, Receive, Scope, Send

access = logging.getLogger("backend.access")

_TRACED = "fastapi.telemetry"  # FastAPI's mark on the scope of a request that it traces
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

# The docs page loads Swagger UI; everything else is data and may load nothing.
_DOCS = "/docs"
_CSP = b"content-security-policy"
_DOCS_CSP = (_CSP, b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_DATA_CSP = (_CSP, b"default-src 'none'; frame-ancestors 'none'")
# Two years; of other names under this host's it says nothing.
_HSTS = (b"strict-transport-security", b"max-age=63072000")
_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_NO_STORE = (b"cache-control", b"no-store")
_NO_CACHE = (b"cache-control", b"private, no-cache")
# A cache must give nobody what another origin was answered, or in another encoding (Fetch, section 3.2.7).
_VARY = (b"vary", b"Accept-Encoding, Origin")


class _Ended(NamedTuple):
    """A request that is over, `at` unix seconds.

    `answered` and `seconds`: from its beginning to that of its answer, and to its end.
    """

    scope: Scope
    status: int
    answered: float
    seconds: float
    at: float
    is_traced: bool  # by FastAPI
    context: Context


class Observability:
    """Pure ASGI, outermost: what goes wrong within has its request id and its line, too.

    What requests leave behind is put down when the loop comes round, for all that have ended by then: many together
    take less time than each by itself, and nobody waits for it (`docs/performance.md`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._ended: list[_Ended] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        if (proxies := state.get("proxies")) is not None:
            proxies.apply(scope)
        metrics = state.get("metrics")
        if metrics is not None:
            metrics.in_progress += 1
        started = time.perf_counter()
        answered = 0.0

        async def send_with_headers(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = time.perf_counter()
                state["status"] = message["status"]
                message["headers"] = _safe_headers(message["headers"], scope, request_id)
            try:
                await send(message)
            except (OSError, RuntimeError):
                # The client has gone: there is nobody to tell, and nothing is wrong here.
                state["client_gone"] = True

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            now = time.perf_counter()
            if metrics is not None:
                metrics.in_progress -= 1
            if not self._ended:
                asyncio.get_running_loop().call_soon(self._put_down)
            status, until = state.get("status", 500), answered or now
            is_traced, at = _TRACED in scope, time.time()
            self._ended.append(_Ended(scope, status, until - started, now - started, at, is_traced, copy_context()))

    def _put_down(self) -> None:
        ended, self._ended = self._ended, []
        for request in ended:
            metrics = request.scope["state"].get("metrics")
            if metrics is not None:
                metrics.answered(request.scope["method"], _route(request.scope), request.status, request.answered)
        if access.isEnabledFor(logging.INFO):
            # To look for a trace takes as long as the line, so there must be a tracer: FastAPI's, or one for all.
            has_tracer = not isinstance(get_tracer_provider(), ProxyTracerProvider)
            _tell([(request.at, _fields(request, has_tracer or request.is_traced)) for request in ended])


def _safe_headers(headers: Iterable[tuple[bytes, bytes]], scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    given = dict(headers)
    told = [*headers, (b"x-request-id", request_id.encode()), *_ALWAYS]
    if b"cache-control" not in given:
        told.append(_NO_CACHE if b"etag" in given else _NO_STORE)
    if b"vary" not in given:
        told.append(_VARY)
    else:
        told += [(b"vary", name) for name in (b"Accept-Encoding", b"Origin") if name not in given[b"vary"]]
    if scope["scheme"] == "https":
        told.append(_HSTS)
    told.append(_DOCS_CSP if scope["path"] == _DOCS else _DATA_CSP)
    return told


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if _REQUEST_ID.fullmatch(value) else os.urandom(16).hex()
    return os.urandom(16).hex()


def _route(scope: Scope) -> str | None:
    """The route's template, never the path: a path may hold anything, and has no bound."""
    route = scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None)


def _fields(request: _Ended, is_traced: bool) -> dict[str, Any]:
    scope = request.scope
    state = scope["state"]
    fields = {
        "request_id": state["request_id"],
        "method": scope["method"],
        "route": _route(scope),
        "status": request.status,
        "ms": round(request.seconds * 1000, 2),
    }
    if is_traced and (span := request.context.run(get_current_span).get_span_context()).is_valid:
        fields["trace_id"] = format_trace_id(span.trace_id)
    if "client_gone" in state:
        fields["client_gone"] = True
    if "user" in state:
        fields["user"] = state["user"].actor.id
    principal = state.get("principal")
    if principal is not None:
        fields["subject"] = principal.subject
        if principal.impersonated_by:
            fields["impersonator"] = principal.impersonated_by
    return fields


class JsonLines(logging.Formatter):
    """One JSON object a line; a line break in a value cannot start a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return _line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)


def _line(created: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
    time = datetime.fromtimestamp(created, UTC)
    line = {"time": time, "level": level, "logger": logger, "message": message, **fields}
    try:
        return orjson.dumps(line, str, orjson.OPT_UTC_Z).decode()
    except TypeError:  # a lone surrogate, which a text from elsewhere may hold
        return json.dumps(line, default=str)


def _tell(requests: list[tuple[float, dict[str, Any]]]) -> None:
    """The lines of requests: when each ended, and what is told of it.

    Where JSON lines are all that becomes of them, no records are made, which take twice as long as the lines
    (`docs/performance.md`).
    """
    handlers: list[logging.Handler] = []
    logger: logging.Logger | None = access
    while logger is not None:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    if len(handlers) == 1 and isinstance(handlers[0], _Lines) and not (access.filters or handlers[0].filters):
        handlers[0].write([_line(at, "info", access.name, "request", fields) for at, fields in requests])
    else:
        for _, fields in requests:
            access.info("request", extra={"fields": fields})


class _Lines(logging.StreamHandler[TextIO]):
    """Takes lines, too, that are written already."""

    def write(self, lines: list[str]) -> None:
        self.acquire()
        try:
            self.stream.write("\n".join([*lines, ""]))
            self.stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            pass
        finally:
            self.release()


class Console(logging.Formatter):
    """For people: the same fields as `name=value`, each escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(
            f" {name}={value if isinstance(value, int | float) else json.dumps(value, default=str)}"
            for name, value in getattr(record, "fields", {}).items()
            if value is not None
        )
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(level: str, format: Literal["json", "console"] | None) -> None:
    """Send every logger of the process through one handler on stderr. uvicorn's own access log is not used."""
    is_for_people = format == "console" or (format is None and sys.stderr.isatty())
    handler = logging.StreamHandler() if is_for_people else _Lines()
    handler.setFormatter(Console() if is_for_people else JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # No line tells of them, and each costs every line (https://docs.python.org/3/howto/logging.html#optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("httpx").setLevel("WARNING")
