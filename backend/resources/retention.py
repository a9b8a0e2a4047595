"""The purge: what has expired leaves the database. No route shows it by then, so nobody waits for this."""

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
from backend.resources.idempotency import KEPT_FOR
from backend.resources.models import FIRST, RETENTION, tombstoned, turn

logger = logging.getLogger(__name__)

BATCH = 1000  # rows that are locked, and lost to a failure, at once
OWNERS_AT_ONCE = 100  # each takes an advisory lock, of which the server has a limited number
MOST_SECONDS_BETWEEN = 3600.0

# Whoever does not get it has nothing to do: another worker is at it. It ends with the transaction.
LOCK = Statement(select(func.pg_try_advisory_xact_lock(func.hashtext(literal_column("'purge'"))).label("ours")))

Position = Mapping[str, object]
BEGINNING = datetime.min.replace(tzinfo=UTC)


class Taken(NamedTuple):
    """How many rows a batch removed, and where the next batch starts; None: this was the last one."""

    rows: int
    next: Position | None


class Kind(Protocol):
    """What expires in one table. `name` is the table's; `statements` read it, first from `start`."""

    name: str
    start: Position
    statements: Sequence[Statement]

    async def take(self, transaction: Transaction, position: Position) -> Taken:
        """Remove one batch, the oldest rows first."""
        ...


class Aged:
    """The rows of a table whose time `at` is longer ago than `retention`.

    The table needs an index that leads with `at`. `rewritten`: its rows may be updated while the purge runs; a row that
    another transaction holds is left for the next purge.
    """

    def __init__(
        self, table: Table, at: Column[datetime], retention: ColumnElement[timedelta], *, rewritten: bool = True
    ) -> None:
        self.name = table.name
        self.start: Position = {"since": BEGINNING}
        key = list(table.primary_key)
        # Index entries of the batches before are dead, and may stay for as long as an old snapshot does. Each batch
        # starts behind them, so that its cost does not grow with their number.
        since = bindparam("since", type_=DateTime(timezone=True))
        batch = select(*key).where(at <= func.now() - retention, at >= since).order_by(at).limit(BATCH)
        if rewritten:
            batch = batch.with_for_update(skip_locked=True)
        self.statements: Sequence[Statement] = [
            Statement(delete(table).where(tuple_(*key).in_(batch)).returning(at.label("at")))
        ]

    async def take(self, transaction: Transaction, position: Position) -> Taken:
        rows = await transaction.rows(self.statements[0], **position)
        return Taken(len(rows), {"since": max(row["at"] for row in rows)} if len(rows) == BATCH else None)


class Tombstones:
    """The rows of a `Synced` table that were deleted longer ago than RETENTION.

    The table needs an index on `deleted_at`, `owner_id`, `id`. Who is writing keeps the rows until the next purge: the
    purge takes an owner's turn only where it is free, and waits for nobody.
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
        self.lock = Statement(select(owner).where(func.pg_try_advisory_xact_lock(turn(owner))), writes=True)
        found = func.unnest(owners, ids).table_valued("owner_id", "id").render_derived()
        key = (table.c.owner_id, table.c.id)
        batch = (
            select(*key)
            .where(tuple_(*key).in_(select(found.c.owner_id, found.c.id)), expired)
            .with_for_update(skip_locked=True)
        )
        self.delete = Statement(delete(table).where(tuple_(*key).in_(batch)).returning(table.c.id))
        self.statements: Sequence[Statement] = [self.find, self.delete]

    async def take(self, transaction: Transaction, position: Position) -> Taken:
        found = await transaction.rows(self.find, **position)
        owners: set[UUID] = set()
        seen = []
        for row in found:
            if row["owner_id"] not in owners and len(owners) == OWNERS_AT_ONCE:
                break
            owners.add(row["owner_id"])
            seen.append(row)
        # A statement of its own: what the owner wrote before is visible to the next one.
        ours = {row["owner"] for row in await transaction.rows(self.lock, owners=list(owners))}
        mine = [row for row in seen if row["owner_id"] in ours]
        taken = await transaction.rows(
            self.delete, owners=[row["owner_id"] for row in mine], ids=[row["id"] for row in mine]
        )
        if len(seen) == len(found) < BATCH:
            return Taken(len(taken), None)
        at, owner, id = (seen[-1][name] for name in ("deleted_at", "owner_id", "id"))
        return Taken(len(taken), {"after_at": at, "after_owner": owner, "after_id": id})


@lru_cache(1)
def kinds() -> Sequence[Kind]:
    """All that expires: tombstones in every table that has them, whoever added it, and what is kept for a time."""
    keys, events, erasures = (
        SQLModel.metadata.tables[name] for name in ("idempotency_keys", "security_events", "erasures")
    )
    return [
        *map(Tombstones, tombstoned()),
        Aged(keys, keys.c.created_at, KEPT_FOR),
        Aged(events, events.c.received_at, RETENTION, rewritten=False),
        Aged(erasures, erasures.c.erased_at, RETENTION),
    ]


async def purge(pool: Pool, metrics: Metrics | None = None) -> int:
    """Remove what has expired; how many rows. Any number of workers may: one of them does it, the others return.

    Tombstones 30 days after the row was deleted, kept answers after 24 hours, the ids of security events and what
    outlives an erased account after 30 days. Each batch is a transaction of its own. A kind that fails is logged, and
    the others go on.
    """
    database = Database(pool, SYSTEM)
    total = 0
    for kind in kinds():
        position: Position | None = kind.start
        try:
            while position is not None:
                taken = await database.transact(partial(_take, kind, position))
                if taken is None:
                    return total
                total += taken.rows
                position = taken.next
        except psycopg.Error as error:
            logger.warning("the purge of %s failed: %s", kind.name, type(error).__name__)
            done = False
        else:
            done = True
        if metrics:
            metrics.purged(kind.name, done=done)
    return total


async def _take(kind: Kind, position: Position, transaction: Transaction) -> Taken | None:
    """One batch; None: another worker is purging."""
    lock = await transaction.row(LOCK)
    return await kind.take(transaction, position) if lock and lock["ours"] else None


async def _a_while() -> None:
    """Workers that started together do not stay together."""
    await asyncio.sleep(MOST_SECONDS_BETWEEN * random.random())  # noqa: S311  # nothing to guess


@asynccontextmanager
async def purging(
    pool: Pool, wait: Callable[[], Awaitable[None]] = _a_while, metrics: Metrics | None = None
) -> AsyncIterator[None]:
    """Purge in the background, each time after `wait`, until the context is left."""
    if metrics:
        metrics.purges(kind.name for kind in kinds())

    async def work() -> None:
        while True:
            await wait()
            try:
                count = await purge(pool, metrics)
            except Exception as error:  # noqa: BLE001 - the edge of a background task, which must not end
                logger.warning("the purge failed: %s", type(error).__name__)
            else:
                logger.info("the purge removed %d rows", count)

    job = asyncio.create_task(work(), name="purge")
    try:
        yield
    finally:
        job.cancel()
        with suppress(asyncio.CancelledError):
            await job
