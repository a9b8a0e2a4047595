"""JSON responses written directly from rows, ETags and conditional requests."""

import re
from datetime import UTC, datetime
from typing import Any

import orjson
import pydantic_core
from fastapi import Request, Response
from pydantic import BaseModel

from backend.database import Row
from backend.web.request_state import public_path

Versions = list[int]

_ENTITY_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_VERSION = re.compile(r'"([1-9][0-9]{0,8})o?"')


# For OpenAPI: headers that the code reads and sets itself.
ETAG = {
    "ETag": {
        "description": "Version of the resource.",
        "required": True,
        "schema": {"type": "string", "examples": ['"3"']},
    }
}
LOCATION = {
    "Location": {
        "description": "Path of the new resource.",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
    }
}
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "The resource has not changed.", "headers": ETAG}}
IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "description": "Proceed only if the current version is one of these (RFC 9110, section 13.1.1).",
    "schema": {"type": "string", "examples": ['"3"', "*"]},
}
IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "description": "Respond 304 if the current version is one of these (RFC 9110, section 13.1.2).",
    "schema": {"type": "string", "examples": ['"3"']},
}

IF_NONE_MATCH_ON_PUT = {
    "name": "If-None-Match",
    "in": "header",
    "description": "`*`: only create. Else: proceed only if the version is none of these (RFC 9110, section 13.1.2).",
    "schema": {"type": "string", "examples": ["*"]},
}


class Answer:
    """Writes rows as JSON with the members of a response model, in its order.

    Rows come typed from PostgreSQL and are not validated again. A test compares the result with the model's.
    """

    def __init__(self, model: type[BaseModel], *, many: bool = False) -> None:
        self._names = tuple(model.model_fields)
        self._many = many

    def members(self, row: Row) -> Row:
        return row if tuple(row) == self._names else {name: row[name] for name in self._names}

    def __call__(self, row: Row, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        """`row`: with `many`, an object whose `items` are rows of one statement or None."""
        if self._many:
            items = row["items"]
            if tuple(next(filter(None, items), self._names)) != self._names:
                items = [item and self.members(item) for item in items]
            value = {**row, "items": items}
        else:
            value = self.members(row)
        return Response(to_json(value), status, headers, "application/json")

    def versioned(self, row: Row, status: int = 200, **headers: str) -> Response:
        """A response with the ETag of the row."""
        return self(row, status, {"ETag": etag(row), **headers})

    def created(self, request: Request, row: Row) -> Response:
        """201 for a POST to a collection, with ETag and Location."""
        return self.versioned(row, 201, Location=f"{public_path(request.scope)}/{row['id']}")

    def unless_known(self, request: Request, row: Row) -> Response:
        """304 if If-None-Match contains the current version, else the row."""
        tag = etag(row)
        return Response(None, 304, {"ETag": tag}) if not_modified(request, tag) else self.versioned(row)


def to_json(value: Any) -> bytes:
    """JSON as pydantic writes it. orjson takes a third of the time; pydantic serializes the types that orjson lacks.

    A time without a time zone is in UTC.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC)
    except TypeError:
        return pydantic_core.to_json(_with_zones(value))


def _with_zones(value: Any) -> Any:
    match value:
        case dict():
            return {name: _with_zones(member) for name, member in value.items()}
        case list():
            return [_with_zones(item) for item in value]
        case datetime(tzinfo=None):
            return value.replace(tzinfo=UTC)
    return value


def etag(row: Row) -> str:
    """`"<version>"`; `"<version>o"` for an overdue task, whose body changes without a new version."""
    return f'"{row["version"]}o"' if row.get("is_overdue") else f'"{row["version"]}"'


def not_modified(request: Request, tag: str) -> bool:
    """Evaluate If-None-Match of a GET with weak comparison (RFC 9110, section 13.1.2)."""
    values = [value for name, value in request.scope["headers"] if name == b"if-none-match"]
    header = b",".join(values).decode("latin-1")
    return header.strip() == "*" or tag in (found.removeprefix("W/") for found in _ENTITY_TAG.findall(header))


def if_match(request: Request) -> Versions | None:
    """The versions in If-Match; None for any version. Uses strong comparison (RFC 9110, section 13.1.1).

    Weak and unknown tags match nothing, so the list may be empty.
    """
    headers = request.headers.getlist("if-match")
    return parse_if_match(",".join(headers)) if headers else None


def parse_if_match(header: str) -> Versions | None:
    """The versions in the text of an If-Match header; None for any version."""
    if header.strip() == "*":
        return None
    return [int(match[1]) for tag in _ENTITY_TAG.findall(header) if (match := _VERSION.fullmatch(tag))]


def if_none_match(request: Request) -> Versions | None:
    """The versions that If-None-Match excludes from a write: None excludes any version, an empty list none.

    Uses weak comparison (RFC 9110, section 13.1.2).
    """
    header = ",".join(request.headers.getlist("if-none-match"))
    if header.strip() == "*":
        return None
    tags = (tag.removeprefix("W/") for tag in _ENTITY_TAG.findall(header))
    return [int(match[1]) for tag in tags if (match := _VERSION.fullmatch(tag))]
