"""The purge: what was deleted 30 days ago leaves the database. No route shows it by then, so nobody waits for this."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import psycopg
from sqlalchemy import delete, func, literal_column, tuple_
from sqlmodel import col, select

from backend.database import SYSTEM, Database, Pool, Statement, Transaction
from backend.tasks.models import Task
from backend.tasks.service import RETENTION

logger = logging.getLogger(__name__)

BATCH = 1000  # rows that are locked, and lost to a failure, at once
MOST_SECONDS_BETWEEN = 3600.0

# Whoever does not get it has nothing to do: another worker is at it. It ends with the transaction.
LOCK = Statement(
    select(func.pg_try_advisory_xact_lock(func.hashtext(literal_column("'purge of deleted tasks'"))).label("ours"))
)
EXPIRED = (
    select(col(Task.owner_id), col(Task.id))
    .where(col(Task.deleted_at) <= func.now() - RETENTION)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
)
PURGE = Statement(delete(Task).where(tuple_(col(Task.owner_id), col(Task.id)).in_(EXPIRED)).returning(col(Task.id)))


async def purge(pool: Pool) -> int:
    """Remove what has expired; how many tasks that were. Any number of workers may do so at once."""
    total = 0
    while count := await Database(pool, SYSTEM).transact(_purge_batch):
        total += count
    return total


async def _purge_batch(transaction: Transaction) -> int:
    lock = await transaction.row(LOCK)
    return len(await transaction.rows(PURGE)) if lock and lock["ours"] else 0


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
                logger.info("the purge removed %d tasks", count)

    job = asyncio.create_task(work(), name="purge")
    try:
        yield
    finally:
        job.cancel()
        with suppress(asyncio.CancelledError):
            await job
