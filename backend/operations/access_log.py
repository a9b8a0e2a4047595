"""The outermost middleware: request id, response headers, metrics and one log line per request."""

import asyncio
import logging
import re
import time
from contextvars import Context, copy_context
from random import getrandbits
from typing import Any

from opentelemetry.trace import ProxyTracerProvider, format_trace_id, get_current_span, get_tracer_provider
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.auth import verified_principal
from backend.operations.log_lines import LineHandler, line
from backend.operations.metrics import Metrics
from backend.web.headers import with_policies
from backend.web.request_state import begin, request_state, route_path
from backend.web.start_up import STATE, WITHOUT_LIFESPAN, refuse

access = logging.getLogger("backend.access")

_TRACED = "fastapi.telemetry"  # in the scope of requests that FastAPI traces
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class AccessLog:
    """Pure ASGI. It is outermost, so that every response has a request id and a log line, errors included.

    Metrics and log lines are written in the next iteration of the event loop, for all requests that have ended by then:
    a batch costs less than single lines, and no response waits for it (`docs/performance.md`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._ended: list[tuple[Scope, Context, bool]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        process = scope.setdefault("state", {})
        if STATE not in process and route_path(scope) not in WITHOUT_LIFESPAN:
            await refuse(scope, receive, send)
        if (proxies := process.get("proxies")) is not None:
            proxies.apply(scope)
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = begin(scope, request_id)
        metrics = process.get("metrics")
        if metrics is not None:
            metrics.in_progress += 1

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.answered = time.perf_counter()
                state.status = message["status"]
                message["headers"] = with_policies(message.get("headers", ()), scope, request_id)
            try:
                await send(message)
            except (OSError, RuntimeError):
                # The client has disconnected. This is no error of the server.
                state.client_gone = True

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            state.ended = time.perf_counter()
            if metrics is not None:
                metrics.in_progress -= 1
            if not self._ended:
                asyncio.get_running_loop().call_soon(self._flush)
            # FastAPI removes the key when it returns.
            self._ended.append((scope, copy_context(), _TRACED in scope))

    def _flush(self) -> None:
        ended, self._ended = self._ended, []
        for scope, _, _ in ended:
            metrics: Metrics | None = scope["state"].get("metrics")
            if metrics is not None:
                state = request_state(scope)
                seconds = (state.answered or state.ended) - state.started
                metrics.answered(scope["method"], _route(scope), state.status or 500, seconds)
        if access.isEnabledFor(logging.INFO):
            # Looking up the trace id takes as long as writing the line, so it is skipped without a tracer.
            has_tracer = not isinstance(get_tracer_provider(), ProxyTracerProvider)
            _write([_fields(scope, context if has_tracer or traced else None) for scope, context, traced in ended])


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if _REQUEST_ID.fullmatch(value) else _new_id()
    return _new_id()


def _new_id() -> str:
    """An id that is unique, not secret: `os.urandom` would be a system call per request."""
    return f"{getrandbits(128):032x}"


def _route(scope: Scope) -> str | None:
    """The template of the route; the path itself may contain anything, and has no bound."""
    route = scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None)


def _fields(scope: Scope, context: Context | None) -> dict[str, Any]:
    """The fields of a log line. `context`: the request's, with its trace; None if it is not traced."""
    state = request_state(scope)
    fields = {
        "request_id": state.request_id,
        "method": scope["method"],
        "route": _route(scope),
        "status": state.status or 500,
        "ms": round((state.ended - state.started) * 1000, 2),
    }
    if context is not None and (span := context.run(get_current_span).get_span_context()).is_valid:
        fields["trace_id"] = format_trace_id(span.trace_id)
    if state.client_gone:
        fields["client_gone"] = True
    if state.caller is not None:
        fields["user"] = state.caller.user.actor.id
    principal = verified_principal(scope)
    if principal is not None:
        fields["subject"] = principal.subject
        if principal.impersonated_by:
            fields["impersonator"] = principal.impersonated_by
    return fields


def _write(requests: list[dict[str, Any]]) -> None:
    """Write the log lines of requests that have just ended, given as fields.

    If a LineHandler is the only handler, lines are written directly: creating a `LogRecord` takes twice as long as the
    line (`docs/performance.md`).
    """
    handlers: list[logging.Handler] = []
    logger: logging.Logger | None = access
    while logger is not None:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    if len(handlers) == 1 and isinstance(handlers[0], LineHandler) and not (access.filters or handlers[0].filters):
        now = time.time()
        handlers[0].write([line(now, "info", access.name, "request", fields) for fields in requests])
    else:
        for fields in requests:
            access.info("request", extra={"fields": fields})
