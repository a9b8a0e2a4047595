"""The executor: runs every statement and every transaction as an actor."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from psycopg import AsyncRawCursor
from psycopg.errors import DeadlockDetected, LockNotAvailable, SerializationFailure

from backend.database.pool import STALE_CONNECTION, Pool
from backend.database.query import SHORT_LOCK_TIMEOUT, Connection, Row, UnreadableRow, lock_timeout
from backend.database.statements import READ_ALONE, TRANSACT, Actor, Cost, Statement

T = TypeVar("T")

# A second attempt may succeed: the locks are taken in another order, or the statement is prepared anew.
_CONFLICT = (DeadlockDetected, SerializationFailure)
_RETRIED = (*_CONFLICT, *STALE_CONNECTION)
_PAUSE = 0.05  # seconds: the other transaction needs a moment to take the lock that this one gave back


class Transaction:
    """Several statements, all or nothing."""

    def __init__(self, pool: Pool, connection: Connection, actor: Actor) -> None:
        self._pool = pool
        self._connection = connection
        self._actor = actor

    async def rows(self, statement: Statement, **values: object) -> list[Row]:
        cursor = AsyncRawCursor(self._connection)
        await cursor.execute(
            statement.sql.encode(), statement.bind(self._actor, values), prepare=self._pool.prepare, binary=True
        )
        self._pool.note_response(self._connection)
        return await cursor.fetchall() if cursor.description else []

    async def row(self, statement: Statement, **values: object) -> Row | None:
        return next(iter(await self.rows(statement, **values)), None)


class Database:
    """Runs statements on the pool as one actor.

    A deadlock, a serialization failure or a stale connection is retried once. Then the `psycopg.Error` is raised.
    """

    def __init__(self, pool: Pool, actor: Actor) -> None:
        self._pool = pool
        self._actor = actor

    async def rows(self, statement: Statement, **values: object) -> list[Row]:
        """Run one statement in one round trip. A write is committed, in its own transaction, before this returns."""
        try:
            return await self._rows(statement, values)
        except _RETRIED as error:
            await _pause_after(error)
            return await self._rows(statement, values)

    async def row(self, statement: Statement, **values: object) -> Row | None:
        rows = await self.rows(statement, **values)
        return rows[0] if rows else None

    async def transact(self, work: Callable[[Transaction], Awaitable[T]], *, asked_by: Actor | None = None) -> T:
        """Run `work` in one transaction, which is committed before this returns.

        `work` may be called several times; it must not have side effects outside the transaction. `asked_by`: the user
        whose turn it takes, if that is not the actor.
        """
        until = self._pool.until()
        async with self._pool.turn(asked_by or self._actor, until):
            try:
                return await self._transact(work, until)
            except _RETRIED as error:
                await _pause_after(error)
                return await self._transact(work, until)

    async def _rows(self, statement: Statement, values: Mapping[str, object]) -> list[Row]:
        lanes, bound = self._pool.lanes, statement.bind(self._actor, values)
        try:
            if statement.cost is Cost.long:
                return await lanes.search(statement.preamble, self._actor, statement.sql, bound)
            if statement.writes:
                return await lanes.write(statement.preamble, self._actor, statement.sql, bound)
            return await lanes.read(statement.preamble, self._actor, statement.sql, bound, alone=READ_ALONE)
        except UnreadableRow as error:
            # A psycopg.DataError would blame the client's input, but the value is stored already.
            raise RuntimeError("a stored value cannot be read") from error

    async def _transact(self, work: Callable[[Transaction], Awaitable[T]], until: float) -> T:
        pool = self._pool
        if not pool.has_lock_permit:
            # The last connection stays available to transactions that need no lock.
            with suppress(LockNotAvailable):
                return await self._attempt(work, until, is_patient=False)
        async with pool.lock_permit(until):
            return await self._attempt(work, until, is_patient=True)

    async def _attempt(self, work: Callable[[Transaction], Awaitable[T]], until: float, *, is_patient: bool) -> T:
        pool = self._pool
        async with pool.connection(until) as connection, connection.transaction():
            left = until - asyncio.get_running_loop().time()
            patience = lock_timeout(left) if is_patient else SHORT_LOCK_TIMEOUT
            await AsyncRawCursor(connection).execute(TRANSACT, (*self._actor, patience), prepare=pool.prepare)
            return await work(Transaction(pool, connection, self._actor))


async def _pause_after(error: Exception) -> None:
    if isinstance(error, _CONFLICT):
        await asyncio.sleep(_PAUSE)
