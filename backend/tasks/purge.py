"""The purge: what has expired leaves the database. No route shows it by then, so nobody waits for this."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any

import psycopg
from sqlalchemy import ARRAY, Column, ColumnElement, Table, Uuid, bindparam, delete, func, literal_column, not_, tuple_
from sqlmodel import SQLModel, col, select

from backend.changes import RETENTION, tombstoned, turn
from backend.database import SYSTEM, Database, Pool, Statement, Transaction
from backend.tasks.idempotency import FRESH
from backend.users.models import Erasure, ReceivedEvent

logger = logging.getLogger(__name__)

BATCH = 1000  # rows that are locked, and lost to a failure, at once
OWNERS_AT_ONCE = 100
MOST_SECONDS_BETWEEN = 3600.0

# Whoever does not get it has nothing to do: another worker is at it. It ends with the transaction.
LOCK = Statement(select(func.pg_try_advisory_xact_lock(func.hashtext(literal_column("'purge'"))).label("ours")))


def expired(table: Table, id: Column[Any], *condition: ColumnElement[bool]) -> Statement:
    """Delete a batch of what meets the conditions."""
    key = (table.c.owner_id, id)
    batch = select(*key).where(*condition).limit(BATCH).with_for_update(skip_locked=True)
    return Statement(delete(table).where(tuple_(*key).in_(batch)).returning(id))


@lru_cache(1)
def bins() -> Sequence[tuple[Statement, Statement]]:
    """For each table that has tombstones, whoever added it: some owners of what has expired, and a batch of that."""
    found = []
    for table in tombstoned():
        in_the_bin = table.c.deleted_at <= func.now() - RETENTION
        some = select(table.c.owner_id).where(in_the_bin).distinct().limit(OWNERS_AT_ONCE).subquery("owners")
        # Each waits for nobody: whoever is writing keeps their bin until the next time.
        owners = select(some.c.owner_id).where(func.pg_try_advisory_xact_lock(turn(some.c.owner_id)))
        theirs = table.c.owner_id == func.any(bindparam("owners", type_=ARRAY(Uuid)))
        found.append((Statement(owners), expired(table, table.c.id, theirs, in_the_bin)))
    return found


KEPT = SQLModel.metadata.tables["idempotency_keys"]
KEYS = expired(KEPT, KEPT.c.key, not_(FRESH))


def noted_long_ago(model: type[ReceivedEvent] | type[Erasure], id: Any, at: Any) -> Statement:
    """Delete a batch of notes of 30 days ago. Nobody but an event of that very person or id waits for them."""
    key = (col(model.issuer), col(id))
    batch = select(*key).where(col(at) <= func.now() - RETENTION).limit(BATCH)
    return Statement(delete(model).where(tuple_(*key).in_(batch)).returning(col(id)))


EVENTS = noted_long_ago(ReceivedEvent, ReceivedEvent.jti, ReceivedEvent.received_at)
ERASURES = noted_long_ago(Erasure, Erasure.subject, Erasure.erased_at)


async def purge(pool: Pool) -> int:
    """Remove what has expired; how many rows. Any number of workers may.

    Tombstones 30 days after the row was deleted, kept answers after 24 hours, the ids of security events and what
    outlives an erased account after 30 days.
    """
    total = 0
    while count := await Database(pool, SYSTEM).transact(_purge_batch):
        total += count
    return total


async def _purge_batch(transaction: Transaction) -> int:
    lock = await transaction.row(LOCK)
    if not (lock and lock["ours"]):
        return 0
    taken = []
    for owners, rows in bins():
        taken += await transaction.rows(rows, owners=[row["owner_id"] for row in await transaction.rows(owners)])
    for statement in KEYS, EVENTS, ERASURES:
        taken += await transaction.rows(statement)
    return len(taken)


async def _a_while() -> None:
    """Workers that started together do not stay together."""
    await asyncio.sleep(MOST_SECONDS_BETWEEN * random.random())  # noqa: S311  # nothing to guess


@asynccontextmanager
async def purging(pool: Pool, wait: Callable[[], Awaitable[None]] = _a_while) -> AsyncIterator[None]:
    """Purge in the background, each time after `wait`. A database that is down is waited for."""

    async def work() -> None:
        while True:
            await wait()
            try:
                count = await purge(pool)
            except psycopg.Error as error:
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
