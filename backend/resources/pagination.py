"""Keyset cursors: pages are stable under inserts, and page 1,000 is as fast as page 1."""

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Integer, Select, Uuid, bindparam, tuple_
from starlette.datastructures import QueryParams
from starlette.requests import Request

from backend.database import Row
from backend.resources.types import Digits
from backend.web.problems import InvalidCursor
from backend.web.request_state import public_path

T = TypeVar("T")
Q = TypeVar("Q", bound=Select[Any])

_ENCODER = json.JSONEncoder(default=str)
MAX_CACHED = 256  # bytes of a query string
_PLAIN_QUERY = re.compile(rb"[A-Za-z0-9_.~+=&:,-]*")

# For OpenAPI.
LINK = {"Link": {"description": 'The next page, as `rel="next"` (RFC 8288).', "schema": {"type": "string"}}}


def without_default(schema: dict[str, Any]) -> None:
    """For `json_schema_extra` of an optional member whose default means nothing to a client."""
    schema.pop("default", None)


class PageQuery(BaseModel):
    """The query parameters of every list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Digits = Field(default=20, ge=1, le=100, description="Maximum number of items.", examples=[50])
    cursor: str | None = Field(
        default=None,
        max_length=2000,
        description="`next_cursor` of the previous page.",
        examples=["WyI1NmE0MGY5Y2UxZTciLCIyMDI2LTExLTIzIDEwOjAwOjAwKzAwOjAwIiwiMDE5YTlkNGUiXQ"],
    )


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(description="The items, in the requested order.")
    next_cursor: str | None = Field(description="Value of `cursor` for the next page; null on the last page.")


def check_filters(query: type[PageQuery], filters: Collection[str], *, others: Collection[str] = ()) -> None:
    """Raise ValueError for a field that a client can set without effect: neither a filter nor one of the `others`."""
    for name in query.model_fields:
        if name not in {*PageQuery.model_fields, "sort", *filters, *others}:
            raise ValueError(f"the field `{name}` of {query.__name__} has no condition in FILTERS")


def fingerprint(name: str, sort: str, filters: Mapping[str, object]) -> str:
    """A hash of the name, sort order and filters of a list. A cursor is valid only for the same list."""
    identity = _ENCODER.encode([name, sort, sorted(filters.items())])
    return blake2b(identity.encode(), digest_size=6).hexdigest()


def encode(bound_to: str, key: object, id: UUID) -> str:
    return pack([bound_to, key, id])


def pack(values: list[Any]) -> str:
    """Encode values as an opaque token for URLs and headers: JSON in base64url."""
    return urlsafe_b64encode(orjson.dumps(values, str, orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC)).decode().rstrip("=")


def unpack(token: str) -> Any:
    """Decode a token. One that is not from `pack` gives any JSON value, or raises ValueError."""
    return orjson.loads(urlsafe_b64decode(token + "=" * (-len(token) % 4)))


def decode(cursor: str, bound_to: str, key_type: TypeAdapter[Any]) -> tuple[Any, UUID]:
    """The sort key and id at the end of the previous page. Raises InvalidCursor.

    A cursor needs no signature: it contains only data of the caller, and every statement is scoped to the caller, so a
    forged cursor cannot return rows of another user.
    """
    try:
        list_hash, key, id = unpack(cursor)
        if list_hash != bound_to:
            raise InvalidCursor
        return key_type.validate_python(key), UUID(id)
    except (ValueError, TypeError, AttributeError, ValidationError):
        raise InvalidCursor from None


def after(cursor: str | None, bound_to: str, key_type: TypeAdapter[Any]) -> dict[str, Any]:
    """The parameters of `keyset` for the page after `cursor`; empty for the first page. Raises InvalidCursor."""
    if cursor is None:
        return {}
    key, id = decode(cursor, bound_to, key_type)
    return {"after_key": key, "after_id": id}


def keyset(
    query: Q, key: ColumnElement[Any], id: ColumnElement[UUID], *, after: ColumnElement[Any] | None, descending: bool
) -> Q:
    """Sort by `key` and `id`, and limit to the parameter `limit`.

    `after`: return only rows after this key and the parameter `after_id`. An index on both columns serves any page.
    """
    if after is not None:
        position, end = tuple_(key, id), tuple_(after, bindparam("after_id", type_=Uuid))
        query = query.where(position < end if descending else position > end)
    return query.order_by(*order(key, id, descending=descending)).limit(bindparam("limit", type_=Integer))


def order(*by: ColumnElement[Any], descending: bool) -> Iterator[ColumnElement[Any]]:
    return (column.desc() if descending else column for column in by)


def page(rows: Sequence[Row], limit: int, bound_to: str, key: str) -> Row:
    """A page of `rows`, of which one more than `limit` was read to detect a next page."""
    items = rows[:limit]
    has_more = len(rows) > limit
    return {"items": items, "next_cursor": encode(bound_to, items[-1][key], items[-1]["id"]) if has_more else None}


def link(request: Request, next_cursor: str | None) -> dict[str, str]:
    """The `Link` header (RFC 8288), with a relative address, which is valid behind any proxy."""
    if next_cursor is None:
        return {}
    given: bytes = request.scope["query_string"]
    rest = (_cached_rest if len(given) <= MAX_CACHED else _rest)(given)
    return {"Link": f'<{public_path(request.scope)}?{rest}cursor={next_cursor}>; rel="next"'}


def _rest(query_string: bytes) -> str:
    """The query string without the cursor, ready for one to be appended."""
    if _PLAIN_QUERY.fullmatch(query_string):
        pairs = [pair for pair in query_string.decode().split("&") if pair.partition("=")[0] != "cursor"]
        kept = "&".join(pairs)
    else:
        kept = urlencode([pair for pair in QueryParams(query_string).multi_items() if pair[0] != "cursor"])
    return f"{kept}&" if kept else ""


_cached_rest = lru_cache(256)(_rest)
