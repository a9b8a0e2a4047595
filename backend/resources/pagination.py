"""Keyset pages: stable under inserts, and no slower on page 1,000 than on page 1."""

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
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

T = TypeVar("T")
Q = TypeVar("Q", bound=Select[Any])

_ENCODER = json.JSONEncoder(default=str)
LONGEST_REMEMBERED = 256  # bytes of a query
_PLAIN_QUERY = re.compile(rb"[A-Za-z0-9_.~+=&:,-]*")

# For OpenAPI.
LINK = {"Link": {"description": '`rel="next"`: the next page (RFC 8288).', "schema": {"type": "string"}}}


def without_default(schema: dict[str, Any]) -> None:
    """For `json_schema_extra`: of a member that may be left out, where the default says nothing to a client."""
    schema.pop("default", None)


class PageQuery(BaseModel):
    """What every listing takes: which page, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Digits = Field(default=20, ge=1, le=100, description="How many on a page.", examples=[50])
    cursor: str | None = Field(
        default=None,
        max_length=2000,
        description="`next_cursor` of the page before.",
        examples=["WyI1NmE0MGY5Y2UxZTciLCIyMDI2LTExLTIzIDEwOjAwOjAwKzAwOjAwIiwiMDE5YTlkNGUiXQ"],
    )


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(description="In the order that was asked for.")
    next_cursor: str | None = Field(description="Pass it as `cursor` for the next page. null: the end.")


def fingerprint(name: str, sort: str, filters: Mapping[str, object]) -> str:
    """What a cursor is bound to: this listing, in this order, of these rows."""
    told = _ENCODER.encode([name, sort, sorted(filters.items())])
    return blake2b(told.encode(), digest_size=6).hexdigest()


def encode(bound_to: str, key: object, id: UUID) -> str:
    return pack([bound_to, key, id])


def pack(told: list[Any]) -> str:
    """JSON that a URL and a header can hold, and that nobody takes for something to be put together by hand."""
    return urlsafe_b64encode(orjson.dumps(told, str, orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC)).decode().rstrip("=")


def unpack(token: str) -> Any:
    """What `pack` was given; of anything else any JSON that could be written again, or ValueError."""
    return orjson.loads(urlsafe_b64decode(token + "=" * (-len(token) % 4)))


def decode(cursor: str, bound_to: str, key_type: TypeAdapter[Any]) -> tuple[Any, UUID]:
    """The sort key and id that a page ended on.

    It holds nothing that its owner may not know, and every statement is scoped to its caller, so it needs no signature:
    whatever is written into one, no row of anybody else's comes back.
    """
    try:
        made_for, key, id = unpack(cursor)
        if made_for != bound_to:
            raise InvalidCursor
        return key_type.validate_python(key), UUID(id)
    except (ValueError, TypeError, AttributeError, ValidationError):
        raise InvalidCursor from None


def after(cursor: str | None, bound_to: str, key_type: TypeAdapter[Any]) -> dict[str, Any]:
    """The parameters of a `keyset` that goes on where `cursor` ended; there are none on the first page."""
    if cursor is None:
        return {}
    key, id = decode(cursor, bound_to, key_type)
    return {"after_key": key, "after_id": id}


def keyset(
    query: Q,
    key: ColumnElement[Any],
    id: ColumnElement[UUID],
    *,
    after: ColumnElement[Any] | None,
    descending: bool,
) -> Q:
    """The first rows by `key`, ties by `id`, as many as the parameter `limit` says.

    `after`: those behind it, and behind the parameter `after_id` among its equals. An index on all of them serves both.
    """
    if after is not None:
        here, end = tuple_(key, id), tuple_(after, bindparam("after_id", type_=Uuid))
        query = query.where(here < end if descending else here > end)
    return query.order_by(*order(key, id, descending=descending)).limit(bindparam("limit", type_=Integer))


def order(*by: ColumnElement[Any], descending: bool) -> Iterator[ColumnElement[Any]]:
    return (column.desc() if descending else column for column in by)


def page(rows: Sequence[Row], limit: int, bound_to: str, key: str) -> Row:
    """A page of rows, of which one more than `limit` was read when there is a next page."""
    items = rows[:limit]
    more = len(rows) > limit
    return {"items": items, "next_cursor": encode(bound_to, items[-1][key], items[-1]["id"]) if more else None}


def link(request: Request, next_cursor: str | None) -> dict[str, str]:
    """The `Link` header (RFC 8288), relative, so that it holds behind any proxy."""
    if next_cursor is None:
        return {}
    given: bytes = request.scope["query_string"]
    rest = (_remembered_rest if len(given) <= LONGEST_REMEMBERED else _rest)(given)
    return {"Link": f'<{request.scope["path"]}?{rest}cursor={next_cursor}>; rel="next"'}


def _rest(query_string: bytes) -> str:
    """What stands in the query before the cursor."""
    if _PLAIN_QUERY.fullmatch(query_string):
        pairs = [pair for pair in query_string.decode().split("&") if pair.partition("=")[0] != "cursor"]
        kept = "&".join(pairs)
    else:
        kept = urlencode([pair for pair in QueryParams(query_string).multi_items() if pair[0] != "cursor"])
    return f"{kept}&" if kept else ""


_remembered_rest = lru_cache(256)(_rest)
