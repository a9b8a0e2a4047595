"""Errors as `application/problem+json` (RFC 9457) with stable codes."""

import logging
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson
import psycopg
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from psycopg_pool import PoolTimeout
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from backend.web.request_state import request_id, route_path

logger = logging.getLogger(__name__)


class ProblemError(BaseModel):
    """One error in a request."""

    loc: list[str | int] = Field(
        description="Location: `body`, `query`, `path` or `header`, then the path of the member."
    )
    msg: str = Field(description="Message for people; it may change.")
    type: str = Field(description="Kind of the error, for programs.")


class Problem(BaseModel):
    """RFC 9457. `code` is stable and listed in docs/errors.md; `detail` is for people and may change."""

    type: str = Field(description="Always `about:blank`; use `code` to distinguish problems.", examples=["about:blank"])
    title: str = Field(description="The reason phrase of the status.")
    status: int = Field(description="The HTTP status code.")
    detail: str | None = Field(description="Explanation for people; it may change.")
    code: str = Field(description="Stable error code, for programs.", examples=["not_found"])
    request_id: str | None = Field(description="The request id, as in `X-Request-ID` and in the log.")
    errors: list[ProblemError] = Field(
        default_factory=list,
        description="With 422: the invalid members, at most 50. For a batch: the operation that failed.",
    )


class DomainError(Exception):
    """Base of the errors that services raise. The docstring of a subclass is the `detail` sent to the client."""

    status = 500
    code = "internal_error"
    errors: Sequence[Mapping[str, Any]] | None = None
    headers: Mapping[str, str] | None = None


class NotFound(DomainError):
    """The resource does not exist or belongs to another user."""

    status, code = 404, "not_found"


class StaleVersion(DomainError):
    """The resource has changed: its current version does not satisfy the precondition. Fetch it, then try again."""

    status, code = 412, "stale_version"


class InvalidCursor(DomainError):
    """The cursor is invalid, or belongs to a list with another sort order or other filters."""

    status, code = 422, "invalid_cursor"
    errors = ({"loc": ["query", "cursor"], "msg": "Start again without a cursor", "type": "invalid_cursor"},)


# The first match decides: a whole SQLSTATE, else its class (PostgreSQL documentation, appendix A).
SQLSTATES: dict[str, tuple[int, str]] = {
    "23505": (409, "conflict"),
    "22001": (422, "invalid_value"),  # too long
    "22003": (422, "invalid_value"),  # number out of range
    "22008": (422, "invalid_value"),  # time out of range
    "22021": (422, "invalid_value"),  # not representable in the encoding of the database
    "22P05": (422, "invalid_value"),
    "23": (409, "constraint_violated"),
    "0A000": (503, "database_busy"),  # cached plan must not change result type
    "26000": (503, "database_busy"),  # the prepared statement does not exist
    "25006": (503, "database_unavailable"),  # read only
    "25P03": (503, "database_unavailable"),  # idle_in_transaction_session_timeout
    "25P04": (503, "database_unavailable"),  # transaction_timeout
    "40": (503, "database_busy"),
    "53": (503, "database_busy"),
    "57014": (503, "database_busy"),  # statement_timeout
    "55P03": (503, "database_busy"),  # lock_timeout
    "57": (503, "database_unavailable"),
    "58": (503, "database_unavailable"),
    "08": (503, "database_unavailable"),
}

# Errors of psycopg itself have no SQLSTATE: a value that it cannot send (NUL), no connection, a lost connection.
WITHOUT_SQLSTATE: tuple[tuple[type[psycopg.Error], tuple[int, str]], ...] = (
    (PoolTimeout, (503, "database_busy")),
    (psycopg.DataError, (422, "invalid_value")),
    (psycopg.OperationalError, (503, "database_unavailable")),
    (psycopg.InterfaceError, (503, "database_unavailable")),
)

DETAILS = {
    "conflict": "The resource already exists.",
    "constraint_violated": "The change violates a constraint of the database.",
    "invalid_value": "A value cannot be stored in the database.",
    "database_busy": "The database is busy. Nothing was changed; try again.",
    "database_unavailable": "The database is unavailable. Try again; an Idempotency-Key makes retries safe.",
    "internal_error": "Unexpected server error. It is logged with the request id.",
}

MOST_ERRORS = 50
LONGEST_NAME = 100

# Reason phrases of RFC 9110; Python 3.11 has older ones.
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
_PACKAGE = Path(__file__).parents[1]
_EXECUTOR = _PACKAGE / "database"
_STATUSES = frozenset(HTTPStatus)
_WITHOUT_CONTENT = frozenset({*range(100, 200), 204, 205, 304})  # RFC 9110, section 6.4.1

# Codes of the errors that the framework raises.
CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
    501: "not_implemented",
    503: "unavailable",
}


def respond(
    request: Request,
    status: int,
    code: str,
    detail: str | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    errors: Sequence[Mapping[str, Any]] | None = None,
) -> Response:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES.get(status) or _phrase(status),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id(request.scope),
    }
    if errors is not None:
        body["errors"] = errors
    return Response(orjson.dumps(body), status, headers, "application/problem+json")


async def domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DomainError)
    detail = str(error) or type(error).__doc__
    return respond(request, error.status, error.code, detail, headers=error.headers, errors=error.errors)


async def http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    if status in _WITHOUT_CONTENT:
        return Response(status_code=status, headers=error.headers)
    code = getattr(error, "code", None) or CODES.get(status) or _name(status)
    headers = error.headers
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        given = Headers(headers or {})
        headers = {**given, "allow": _methods(request, given.get("allow", ""))}
    return respond(request, status, code, error.detail, headers=headers)


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in _STATUSES else f"Status {status}"


def _name(status: int) -> str:
    return HTTPStatus(status).name.lower() if status in _STATUSES else f"status_{status}"


def _methods(request: Request, known: str) -> str:
    """All methods of a path (RFC 9110, section 10.2.1). Starlette names only those of the first matching route."""
    found = set(filter(None, known.replace(",", " ").split()))
    path = route_path(request.scope)
    for route in iter_route_contexts(request.app.routes):
        pattern = getattr(route, "path_regex", None)  # a route for a host has none
        if pattern is not None and pattern.match(path):
            found |= route.methods or set()
    return ", ".join(sorted(found))


async def invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"loc": [_short(part) for part in e["loc"]], "msg": e["msg"], "type": e["type"]}
        for e in error.errors()[:MOST_ERRORS]
    ]
    if any(e["type"] == "json_invalid" for e in errors):
        return respond(request, 422, "invalid_json", "The request body is not valid JSON.", errors=errors)
    return respond(request, 422, "invalid", "The request is invalid: see errors.", errors=errors)


def _short(part: str | int) -> str | int:
    """Shorten the names of members, which a client can choose."""
    return part[:LONGEST_NAME] if isinstance(part, str) else part


async def database_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, psycopg.Error)
    state = error.sqlstate
    if state:
        status, code = SQLSTATES.get(state) or SQLSTATES.get(state[:2]) or (500, "internal_error")
    else:
        status, code = next(
            (problem for kind, problem in WITHOUT_SQLSTATE if isinstance(error, kind)), (500, "internal_error")
        )
    if status >= 500:
        # Only the SQLSTATE or type is logged: the message of a database error may quote values.
        place = _place(error) if status == HTTPStatus.INTERNAL_SERVER_ERROR else ""
        logger.error("database error %s%s", state or type(error).__name__, place)
    return respond(request, status, code, DETAILS[code], headers={"Retry-After": "1"} if status == 503 else None)


def _place(error: Exception) -> str:
    """Where this package gave the executor the statement that failed: ` at file:line function`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(_PACKAGE) and not file.is_relative_to(_EXECUTOR):
            return f" at {file.relative_to(_PACKAGE.parent)}:{frame.lineno} {frame.name}"
    return ""


async def internal_error(request: Request, _: Exception) -> Response:
    return respond(request, 500, "internal_error", DETAILS["internal_error"])
