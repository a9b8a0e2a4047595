"""The purge: deletes expired rows in the background. No route returns a row that has expired."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import NamedTuple, Protocol
from uuid import UUID

import psycopg
from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    DateTime,
    Table,
    Uuid,
    bindparam,
    delete,
    func,
    literal_column,
    tuple_,
)
from sqlmodel import SQLModel, select

from backend.database import SYSTEM, Database, Pool, Statement, Transaction
from backend.operations.metrics import Metrics
from backend.resources import idempotency
from backend.resources.models import FIRST, RETENTION, changes_lock, tombstoned

logger = logging.getLogger(__name__)

BATCH = 1000  # rows per transaction
OWNERS_PER_BATCH = 100  # each takes an advisory lock, whose number is limited by the server
MAX_INTERVAL = 3600.0  # seconds between two purges of a worker

# Held by the worker that purges, until the end of the transaction. The other workers skip the purge.
LOCK = Statement(select(func.pg_try_advisory_xact_lock(func.hashtext(literal_column("'purge'"))).label("acquired")))

Position = Mapping[str, object]
BEGINNING = datetime.min.replace(tzinfo=UTC)


class Purged(NamedTuple):
    """The number of rows that a batch deleted, and the position of the next batch; None after the last one."""

    rows: int
    next: Position | None


class Expiring(Protocol):
    """The expiring rows of the table `name`. `statements` read it; the first batch begins at `start`."""

    name: str
    start: Position
    statements: Sequence[Statement]

    async def purge(self, transaction: Transaction, position: Position) -> Purged:
        """Delete one batch, the oldest rows first."""
        ...


class Aged:
    """The rows of a table whose time `at` is older than `retention`.

    The table needs an index that begins with `at`. `rewritten`: rows may be updated during the purge; locked rows are
    left for the next purge.
    """

    def __init__(
        self, table: Table, at: Column[datetime], retention: ColumnElement[timedelta], *, rewritten: bool = True
    ) -> None:
        self.name = table.name
        self.start: Position = {"since": BEGINNING}
        key = list(table.primary_key)
        # Dead index entries of earlier batches remain while an old snapshot exists. Each batch starts after them, so
        # that its cost does not grow with their number.
        since = bindparam("since", type_=DateTime(timezone=True))
        batch = select(*key).where(at <= func.now() - retention, at >= since).order_by(at).limit(BATCH)
        if rewritten:
            batch = batch.with_for_update(skip_locked=True)
        self.statements: Sequence[Statement] = [
            Statement(delete(table).where(tuple_(*key).in_(batch)).returning(at.label("at")))
        ]

    async def purge(self, transaction: Transaction, position: Position) -> Purged:
        rows = await transaction.rows(self.statements[0], **position)
        return Purged(len(rows), {"since": max(row["at"] for row in rows)} if len(rows) == BATCH else None)


class Tombstones:
    """The rows of a `Synced` table that were deleted longer ago than RETENTION.

    The table needs an index on `deleted_at`, `owner_id`, `id`. The purge takes the advisory lock of an owner only if it
    is free; the rows of an owner who is writing are left for the next purge.
    """

    def __init__(self, table: Table) -> None:
        self.name = table.name
        self.start: Position = {"after_at": BEGINNING, "after_owner": FIRST, "after_id": FIRST}
        place = (table.c.deleted_at, table.c.owner_id, table.c.id)
        after = tuple_(
            bindparam("after_at", type_=DateTime(timezone=True)),
            bindparam("after_owner", type_=Uuid),
            bindparam("after_id", type_=Uuid),
        )
        expired = table.c.deleted_at <= func.now() - RETENTION
        owners, ids = (bindparam(name, type_=ARRAY(Uuid)) for name in ("owners", "ids"))
        self.find = Statement(select(*place).where(expired, tuple_(*place) > after).order_by(*place).limit(BATCH))
        owner = func.unnest(owners).column_valued("owner")
        self.lock = Statement(select(owner).where(func.pg_try_advisory_xact_lock(changes_lock(owner))), writes=True)
        found = func.unnest(owners, ids).table_valued("owner_id", "id").render_derived()
        key = (table.c.owner_id, table.c.id)
        batch = (
            select(*key)
            .where(tuple_(*key).in_(select(found.c.owner_id, found.c.id)), expired)
            .with_for_update(skip_locked=True)
        )
        self.delete = Statement(delete(table).where(tuple_(*key).in_(batch)).returning(table.c.id))
        self.statements: Sequence[Statement] = [self.find, self.delete]

    async def purge(self, transaction: Transaction, position: Position) -> Purged:
        found = await transaction.rows(self.find, **position)
        owners: set[UUID] = set()
        seen = []
        for row in found:
            if row["owner_id"] not in owners and len(owners) == OWNERS_PER_BATCH:
                break
            owners.add(row["owner_id"])
            seen.append(row)
        # A separate statement, so that the next one sees what the owner has written before.
        locked = {row["owner"] for row in await transaction.rows(self.lock, owners=list(owners))}
        batch = [row for row in seen if row["owner_id"] in locked]
        deleted = await transaction.rows(
            self.delete, owners=[row["owner_id"] for row in batch], ids=[row["id"] for row in batch]
        )
        if len(seen) == len(found) < BATCH:
            return Purged(len(deleted), None)
        at, owner, id = (seen[-1][name] for name in ("deleted_at", "owner_id", "id"))
        return Purged(len(deleted), {"after_at": at, "after_owner": owner, "after_id": id})


@lru_cache(1)
def expiring_tables() -> Sequence[Expiring]:
    """All tables with expiring rows: those with tombstones, and those whose rows have a retention time."""
    keys, events, erasures = (
        SQLModel.metadata.tables[name] for name in ("idempotency_keys", "security_events", "erasures")
    )
    return [
        *map(Tombstones, tombstoned()),
        Aged(keys, keys.c.created_at, idempotency.RETENTION),
        Aged(events, events.c.received_at, RETENTION, rewritten=False),
        Aged(erasures, erasures.c.erased_at, RETENTION),
    ]


async def purge(pool: Pool, metrics: Metrics | None = None) -> int:
    """Delete expired rows and return their number. Of several workers only one purges; the others return at once.

    Stored responses expire after 24 hours; tombstones, ids of security events and records of erased accounts after 30
    days. Each batch is a transaction of its own. The failure of a table is logged and does not stop the others.
    """
    database = Database(pool, SYSTEM)
    total = 0
    for table in expiring_tables():
        position: Position | None = table.start
        try:
            while position is not None:
                purged = await database.transact(partial(_purge_batch, table, position))
                if purged is None:
                    return total
                total += purged.rows
                position = purged.next
        except psycopg.Error as error:
            logger.warning("the purge of %s failed: %s", table.name, type(error).__name__)
            done = False
        else:
            done = True
        if metrics:
            metrics.purged(table.name, done=done)
    return total


async def _purge_batch(table: Expiring, position: Position, transaction: Transaction) -> Purged | None:
    """Purge one batch; None if another worker is purging."""
    lock = await transaction.row(LOCK)
    return await table.purge(transaction, position) if lock and lock["acquired"] else None


async def _random_interval() -> None:
    """Wait for a random time, so that workers do not purge at the same moment."""
    await asyncio.sleep(MAX_INTERVAL * random.random())  # noqa: S311  # nothing to guess


@asynccontextmanager
async def purging(
    pool: Pool, wait: Callable[[], Awaitable[None]] = _random_interval, metrics: Metrics | None = None
) -> AsyncIterator[None]:
    """Purge in the background while entered, each time after `wait`."""
    if metrics:
        metrics.purges(table.name for table in expiring_tables())

    async def work() -> None:
        while True:
            await wait()
            try:
                count = await purge(pool, metrics)
            except Exception as error:  # noqa: BLE001 - outer edge of a background task, which must not end
                logger.warning("the purge failed: %s", type(error).__name__)
            else:
                logger.info("the purge deleted %d rows", count)

    job = asyncio.create_task(work(), name="purge")
    try:
        yield
    finally:
        job.cancel()
        with suppress(asyncio.CancelledError):
            await job
