"""Streams all data of the caller as NDJSON. Holds one batch of rows and no database connection while a client reads."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

from fastapi.responses import StreamingResponse
from psycopg_pool import PoolTimeout
from pydantic_core import to_json
from sqlalchemy import Table, bindparam, select, tuple_

from backend.database import Cost, Database, Row, Statement
from backend.resources.models import CALLER
from backend.users import owned_data

FORMAT: Final = 1
BATCH: Final = 200  # rows
ATTEMPTS: Final = 10  # to get a connection for a batch, 3 s each


class Listing(NamedTuple):
    """The statements for one table, in key order. `next` reads the batch after the parameters `after_<column>`."""

    key: tuple[str, ...]
    first: Statement
    next: Statement


class Lines(StreamingResponse):
    media_type = "application/x-ndjson"


@lru_cache(1)
def listings() -> Mapping[str, Listing]:
    return {table.name: listing(table) for table in owned_data.tables() if not owned_data.is_bookkeeping(table)}


def listing(table: Table) -> Listing:
    key = [column for column in table.primary_key if column.name != "owner_id"]
    columns = [c for c in table.c if c.computed is None and c.name != "owner_id" and not owned_data.is_bookkeeping(c)]
    query = select(*columns).where(table.c.owner_id == CALLER).order_by(*key).limit(BATCH)
    after = tuple_(*(bindparam(f"after_{column.name}", type_=column.type) for column in key))
    first, following = (Statement(each, cost=Cost.long) for each in (query, query.where(tuple_(*key) > after)))
    return Listing(tuple(column.name for column in key), first, following)


async def lines(database: Database, me: Row) -> AsyncIterator[bytes]:
    """`me`: the caller's own row. The last line contains the number of rows; without it the export is incomplete.

    Each batch is read in a transaction of its own, so the export is not a snapshot.
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
    """Retry while the pool is exhausted: the response has started, and an export holds no connection meanwhile."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await database.rows(statement, **after)
        except PoolTimeout:
            continue
    return await database.rows(statement, **after)


def line(kind: str, **members: Any) -> bytes:
    return to_json({"kind": kind, **members}, bytes_mode="base64") + b"\n"
