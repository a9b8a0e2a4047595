"""Everything of the caller, as lines of JSON: one batch of rows in memory, and no connection while a client reads."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

from fastapi.responses import StreamingResponse
from psycopg_pool import PoolTimeout
from pydantic_core import to_json
from sqlalchemy import Table, bindparam, select, tuple_
from sqlmodel import SQLModel

from backend.database import Cost, Database, Row, Statement
from backend.resources.models import CALLER
from backend.users import belongings

FORMAT: Final = 1
BATCH: Final = 200  # rows
PATIENCE: Final = 10  # times that a batch waits in the queue, 3 s each

USERS = SQLModel.metadata.tables["users"]
ME = Statement(select(USERS).where(USERS.c.id == CALLER))


class Listing(NamedTuple):
    """The rows of a table by their key: the first of them, and those behind the parameters `after_<column>`."""

    key: tuple[str, ...]
    first: Statement
    next: Statement


class Lines(StreamingResponse):
    media_type = "application/x-ndjson"


@lru_cache(1)
def listings() -> Mapping[str, Listing]:
    return {table.name: listing(table) for table in belongings.tables() if not belongings.is_bookkeeping(table)}


def listing(table: Table) -> Listing:
    key = [column for column in table.primary_key if column.name != "owner_id"]
    columns = [c for c in table.c if c.computed is None and c.name != "owner_id" and not belongings.is_bookkeeping(c)]
    query = select(*columns).where(table.c.owner_id == CALLER).order_by(*key).limit(BATCH)
    after = tuple_(*(bindparam(f"after_{column.name}", type_=column.type) for column in key))
    first, following = (Statement(each, cost=Cost.long) for each in (query, query.where(tuple_(*key) > after)))
    return Listing(tuple(column.name for column in key), first, following)


async def lines(database: Database, me: Row) -> AsyncIterator[bytes]:
    """`me`: the caller's own row. The last line says how many rows there were: without it, some are missing.

    Each batch is of its own moment: what is changed meanwhile is there as it was or as it is.
    """
    names = ["users", *listings()]
    yield line("export", format=FORMAT, made_at=datetime.now(UTC), subject=me["subject"], tables=names)
    yield line("users", row=me)
    count = 1
    for name, found in listings().items():
        rows = await _batch(database, found.first)
        while rows:
            count += len(rows)
            yield b"".join(line(name, row=row) for row in rows)
            after = {f"after_{part}": rows[-1][part] for part in found.key}
            rows = await _batch(database, found.next, **after) if len(rows) == BATCH else []
    yield line("end", rows=count)


async def _batch(database: Database, statement: Statement, **after: object) -> list[Row]:
    """The answer has begun, so a full queue must not end it: the export holds nothing that others wait for."""
    for _ in range(PATIENCE - 1):
        try:
            return await database.rows(statement, **after)
        except PoolTimeout:
            continue
    return await database.rows(statement, **after)


def line(kind: str, **members: Any) -> bytes:
    return to_json({"kind": kind, **members}, bytes_mode="base64") + b"\n"
