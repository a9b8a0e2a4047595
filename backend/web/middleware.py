"""Allowed hosts, CORS, compression and HEAD: pure ASGI middleware between the access log and the rate limits.

FastAPI's middleware is used for all of it. These classes only configure it from the settings, which are known when the
process has started, and skip it for requests that it would not change.
"""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.web import problems
from backend.web.request_state import request_state

MAX_HOSTS = 100  # allowed host names that are cached; a pattern allows any number
MIN_COMPRESSED = 1024  # bytes

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_REQUEST_HEADERS = (
    "Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "Last-Event-ID",
    "X-Request-ID",
)  # fmt: skip
_RESPONSE_HEADERS = (
    "Allow", "Content-Disposition", "Deprecation", "ETag", "Idempotency-Replayed", "Link", "Location", "RateLimit",
    "RateLimit-Policy", "Retry-After", "Sunset", "WWW-Authenticate", "X-Request-ID",
)  # fmt: skip
# Headers of a rejected preflight response that are sent with the problem.
_PREFLIGHT = {"vary", "access-control-allow-origin", "access-control-allow-methods", "access-control-max-age"}


class HeadAsGet:
    """Ends the response to HEAD after its headers (RFC 9110, section 9.3.2). `Dispatch` finds the route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            receive, send = _without_content(receive, send)
        await self.app(scope, receive, send)


class PlainTextErrorsAsProblems:
    """ASGI middleware around Starlette's CORS and host checks: turns their plain-text 400 responses into problems.

    Requests that pass these checks have `host_allowed` set in their RequestState; their responses are sent unchanged.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: Message | None = None

        async def send_problem(message: Message) -> None:
            nonlocal refusal
            is_refusal = message["type"] == "http.response.start" and message["status"] == HTTPStatus.BAD_REQUEST
            if is_refusal and not request_state(scope).host_allowed:
                headers = Headers(raw=message["headers"])
                if headers.get("content-type", "").startswith("text/plain"):
                    refusal = message
                    return
            if refusal is None:
                await send(message)
                return
            kept = {name: value for name, value in Headers(raw=refusal["headers"]).items() if name in _PREFLIGHT}
            detail = message["body"].decode()
            response = problems.respond(Request(scope), refusal["status"], "bad_request", detail, headers=kept)
            await response(scope, receive, send)

        await self.app(scope, receive, send_problem)


class CrossOrigin:
    """Allowed hosts, CORS and gzip, as the settings say.

    Requests without `Origin` that do not accept gzip, for a host that was allowed before, skip all three
    (`docs/performance.md`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._inner = app
        self._compressed = GZipMiddleware(app, minimum_size=MIN_COMPRESSED, compresslevel=4)
        self._settings: object = None  # those of the lifespan that the chain is assembled for
        self._chain = self._sockets = app
        self._allowed_hosts: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        settings = scope["state"].get("settings")
        if settings is not self._settings:
            self._configure(settings)
        if scope["type"] == "websocket":
            await self._sockets(scope, receive, send)
        else:
            await (self._chain if self._needs_chain(scope["headers"]) else self._inner)(scope, receive, send)

    def _needs_chain(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether the request has an Origin, accepts gzip, or names a host that is not known to be allowed."""
        hosts = 0
        for name, value in headers:
            if name == b"origin" or (name == b"accept-encoding" and b"gzip" in value.lower()):
                return True
            if name == b"host":
                hosts += 1
                if value not in self._allowed_hosts:
                    return True
        return hosts != 1

    async def _allowed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The inner end of the chain: only requests with an allowed host arrive here."""
        request_state(scope).host_allowed = True
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) == 1 and len(self._allowed_hosts) < MAX_HOSTS:
            self._allowed_hosts.update(hosts)
        await self._compressed(scope, receive, send)

    def _configure(self, settings: Any) -> None:
        """`settings`: None without a lifespan, for requests that need none."""
        self._settings, self._allowed_hosts = settings, set()
        self._chain = self._sockets = self._inner
        if settings is not None:
            self._chain = self._assemble(settings.cors_origins, settings.trusted_hosts)
            if "*" not in settings.trusted_hosts:
                self._sockets = _trusted_host(self._inner, settings.trusted_hosts)

    def _assemble(self, origins: tuple[str, ...], hosts: tuple[str, ...]) -> ASGIApp:
        app: ASGIApp = self._allowed
        if origins:
            app = CORSMiddleware(
                app,
                allow_origins=origins,
                allow_methods=_METHODS,
                allow_headers=_REQUEST_HEADERS,
                expose_headers=_RESPONSE_HEADERS,
                max_age=3600,
            )
        if "*" not in hosts:
            app = _trusted_host(app, hosts)
        return PlainTextErrorsAsProblems(app)


def _trusted_host(app: ASGIApp, hosts: tuple[str, ...]) -> ASGIApp:
    return TrustedHostMiddleware(app, allowed_hosts=hosts, www_redirect=False)


def _without_content(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """End the response with its head. A stream then receives a disconnect, so that it ends, too."""
    has_ended = False

    async def receive_until_end() -> Message:
        return {"type": "http.disconnect"} if has_ended else await receive()

    async def send_head(message: Message) -> None:
        nonlocal has_ended
        if has_ended:
            return
        await send(message)
        if message["type"] == "http.response.start":
            has_ended = True
            await send({"type": "http.response.body", "body": b""})

    return receive_until_end, send_head
