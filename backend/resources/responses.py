"""Rows to JSON, the short way: written as the response model says, without building it."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import pydantic_core
from fastapi import Request, Response
from pydantic import BaseModel

from backend.database import Row

Versions = list[int]

_ENTITY_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_VERSION = re.compile(r'"([1-9][0-9]{0,8})o?"')


# For OpenAPI: headers that are read from the request and set on the answer by hand.
ETAG = {
    "ETag": {
        "description": "The version of what is shown.",
        "required": True,
        "schema": {"type": "string", "examples": ['"3"']},
    }
}
LOCATION = {
    "Location": {
        "description": "Where it is.",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
    }
}
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing has changed.", "headers": ETAG}}
IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "description": "Only if the version is one of these (RFC 9110, section 13.1.1).",
    "schema": {"type": "string", "examples": ['"3"', "*"]},
}
IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "description": "304 if the version is one of these (RFC 9110, section 13.1.2).",
    "schema": {"type": "string", "examples": ['"3"']},
}

IF_NONE_MATCH_ON_PUT = {
    "name": "If-None-Match",
    "in": "header",
    "description": "`*`: only if there is none. Else: only if the version is none of these (RFC 9110, section 13.1.2).",
    "schema": {"type": "string", "examples": ["*"]},
}


class JSONBytes(Response):
    """JSON that is written already. Starlette looks at each header for one of its own (`docs/performance.md`)."""

    def __init__(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.body = body
        self.status_code = status
        self.background = None
        self.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *[(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        ]


class Answer:
    """Writes rows with the members of a model, in its order, and no others.

    PostgreSQL has typed them already, so they are not validated again. A test holds both ways equal.
    """

    def __init__(self, model: type[BaseModel], *, many: bool = False) -> None:
        self._names = tuple(model.model_fields)
        self._many = many

    def members(self, row: Row) -> Row:
        return row if tuple(row) == self._names else {name: row[name] for name in self._names}

    def __call__(self, row: Row, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        """`row`: with `many`, what has rows as its `items`, all of one statement. None among them stays."""
        if self._many:
            items = row["items"]
            if tuple(next(filter(None, items), self._names)) != self._names:
                items = [item and self.members(item) for item in items]
            told = {**row, "items": items}
        else:
            told = self.members(row)
        return JSONBytes(to_json(told), status, headers or {})

    def versioned(self, row: Row, status: int = 200, **headers: str) -> Response:
        """With its ETag."""
        return self(row, status, {"ETag": etag(row), **headers})

    def created(self, request: Request, row: Row) -> Response:
        """201, for a POST to the collection."""
        return self.versioned(row, 201, Location=f"{request.scope['path']}/{row['id']}")

    def unless_known(self, request: Request, row: Row) -> Response:
        """304 if If-None-Match names the version that there is, else the row."""
        tag = etag(row)
        return Response(None, 304, {"ETag": tag}) if not_modified(request, tag) else self.versioned(row)


def to_json(told: Any) -> bytes:
    """As pydantic writes JSON, which orjson does in a third of the time. It knows fewer kinds of values.

    A time without a zone is one in UTC.
    """
    try:
        return orjson.dumps(told, option=orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC)
    except TypeError:
        return pydantic_core.to_json(_with_zones(told))


def _with_zones(told: Any) -> Any:
    match told:
        case dict():
            return {name: _with_zones(value) for name, value in told.items()}
        case list():
            return [_with_zones(value) for value in told]
        case datetime(tzinfo=None):
            return told.replace(tzinfo=UTC)
    return told


def etag(row: Row) -> str:
    """`"<version>"`, and `"<version>o"` while overdue, since the body then changes without a new version."""
    return f'"{row["version"]}o"' if row.get("is_overdue") else f'"{row["version"]}"'


def not_modified(request: Request, tag: str) -> bool:
    """If-None-Match on a GET: the weak comparison of RFC 9110, section 13.1.2."""
    values = [value for name, value in request.scope["headers"] if name == b"if-none-match"]
    header = b",".join(values).decode("latin-1")
    return header.strip() == "*" or tag in (found.removeprefix("W/") for found in _ENTITY_TAG.findall(header))


def if_match(request: Request) -> Versions | None:
    """The versions that If-Match allows: None is any. The strong comparison of RFC 9110, section 13.1.1.

    A tag that is weak or was never ours matches nothing, so the list may be empty.
    """
    headers = request.headers.getlist("if-match")
    return allowed(",".join(headers)) if headers else None


def allowed(header: str) -> Versions | None:
    """The same, of the header's text."""
    if header.strip() == "*":
        return None
    return [int(match[1]) for tag in _ENTITY_TAG.findall(header) if (match := _VERSION.fullmatch(tag))]


def if_none_match(request: Request) -> Versions | None:
    """The versions that If-None-Match on a write forbids: None is any, an empty list none.

    The weak comparison of RFC 9110, section 13.1.2.
    """
    header = ",".join(request.headers.getlist("if-none-match"))
    if header.strip() == "*":
        return None
    tags = (tag.removeprefix("W/") for tag in _ENTITY_TAG.findall(header))
    return [int(match[1]) for tag in tags if (match := _VERSION.fullmatch(tag))]
