"""The one way to PostgreSQL: a statement is compiled once, and always runs as somebody."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from copy import copy
from enum import StrEnum
from typing import Any, Final, LiteralString, NamedTuple, Self, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import (
    DeadlockDetected,
    FeatureNotSupported,
    InvalidSqlStatementName,
    LockNotAvailable,
    SerializationFailure,
)
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from sqlalchemy import ClauseElement, Select, bindparam
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql.compiler import SQLCompiler

from backend.database.pipeline import BRIEFLY, Job, UnreadableRow, Wire, Wires, is_alive, what_is_left
from backend.database.pipeline import Connection as Connection
from backend.database.pipeline import Row as Row

T = TypeVar("T")

_DIALECT = PGDialect_psycopg(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it unannotated

LEAST_SIZE = 5

# One statement gives a transaction its role, its caller, its clock and its limits of time. All of them end with the
# transaction, so neither this pool nor a pooler behind it can carry them to the next request.
_BECOME: LiteralString = (
    "SELECT set_config('role', $1, true), set_config('app.caller', $2, true), set_config('timezone', 'UTC', true),"
)
_AUTO: LiteralString = " set_config('plan_cache_mode', 'auto', true)"
_KEEP_PLANS: LiteralString = " set_config('plan_cache_mode', 'force_generic_plan', true)"

# A short read shares its connection with other statements, which stand behind it, so it waits for a lock only briefly
# there. Everywhere else the lock_timeout is the rest of the time that a request may wait.
_READ: LiteralString = (
    _BECOME + " set_config('statement_timeout', '2s', true), set_config('lock_timeout', '50ms', true),"
)
_WRITE: LiteralString = _BECOME + " set_config('statement_timeout', '4s', true), set_config('lock_timeout', $3, true),"
_SEARCH: LiteralString = _WRITE.replace("'4s'", "'10s'")
_READ_ALONE: LiteralString = _WRITE + _AUTO
# The server ends a session that is idle in a transaction, because its client is dead or will not finish in time.
_TRANSACT: LiteralString = _SEARCH + " set_config('idle_in_transaction_session_timeout', '5s', true)," + _AUTO
_PROBE: LiteralString = "SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', $2, true)"

# For libpq, unless the URL says otherwise: it notices a dead server after 11 s on an idle connection, and after 5 s if
# it has sent something. In seconds; `tcp_user_timeout` in milliseconds.
_KEEPALIVES: dict[str, int] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5000,
}
# The same for the server, which otherwise keeps the session and the locks of a machine that lost its power for hours.
# Nothing is set behind a pooler, since other clients use its connections, too. There the process id that the client was
# told differs from that of the server.
NOTICE_DEAD_CLIENT: LiteralString = (
    "SELECT set_config('tcp_keepalives_idle', '5', false), set_config('tcp_keepalives_interval', '2', false),"
    " set_config('tcp_keepalives_count', '3', false), set_config('tcp_user_timeout', '5000', false)"
    " WHERE pg_backend_pid() = %s"
)

# The second time may go well: locks in another order, or a connection that has not prepared the statement in the days
# before a migration (0A000, "cached plan must not change result type") or on another server of a pooler (26000).
_BEATEN = (DeadlockDetected, SerializationFailure)
_STALE_CONNECTION = (FeatureNotSupported, InvalidSqlStatementName)
_WORTH_A_SECOND_TRY = (*_BEATEN, *_STALE_CONNECTION)
_PAUSE = 0.05  # seconds: whoever won needs a moment to take the lock that the loser gave back


class Actor(NamedTuple):
    """Who a transaction belongs to. There is no other way in, so a superuser's login is never used as such."""

    role: LiteralString
    id: str = ""

    @classmethod
    def user(cls, id: UUID) -> Self:
        return cls("api_user", str(id))


SYSTEM = Actor("api_system")


class Cost(StrEnum):
    """How much a statement may read; it decides on which connections the statement runs."""

    short = "short"  # by key, or one page of an index: milliseconds, however much its owner has
    long = "long"  # grows with what the owner has: search, filters, counts, export, the first copy of a sync


class Statement:
    """A SQLAlchemy expression as SQL text. Build it at import, or behind `lru_cache` when its shape varies.

    Its parameters are bound by name; one named `caller` is the id of the actor it runs as.
    `keeps_plan`: one plan serves all values, so PostgreSQL shall not look for a better one each time, which takes
    longer than to run it (`docs/performance.md`). It holds where the statement runs alone, not within a transaction.
    `writes`: to be said of a SELECT that does something. Reads share transactions: an error of another would undo it.
    `cost`: `Cost.long` for a read that does not take milliseconds for every owner; no effect within a transaction.
    """

    def __init__(
        self, clause: ClauseElement, *, keeps_plan: bool = False, writes: bool = False, cost: Cost = Cost.short
    ) -> None:
        compiled = clause.compile(dialect=_DIALECT)
        assert isinstance(compiled, SQLCompiler)
        self.sql = compiled.string
        self.writes = writes or not isinstance(clause, Select) or any(cte.element.is_dml for cte in compiled.ctes or ())
        self.names = compiled.positiontup or []
        self.cost = cost
        self._plans = _KEEP_PLANS if keeps_plan else _AUTO
        self.become = self._preamble()
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def at(self, cost: Cost) -> "Statement":
        """The same statement, for a use in which it reads more or less."""
        other = copy(self)
        other.cost = cost
        other.become = other._preamble()  # noqa: SLF001  # of the same class
        return other

    def _preamble(self) -> LiteralString:
        return (_SEARCH if self.cost is Cost.long else _WRITE if self.writes else _READ) + self._plans

    def bind(self, actor: Actor, values: Mapping[str, object]) -> list[object]:
        """The values of its parameters, in order."""
        given = {**self._constants, **values, "caller": actor.id or None}
        return [given[name] for name in self.names]


class Pool:
    """The connections of this process. `async with` opens them; a server that is down is found out at first use."""

    def __init__(
        self, url: str, *, size: int = 10, prepare: bool = True, wait: float = 3.0, deadline: float = 12.0
    ) -> None:
        """`size`: 5 or more; for short reads, single writes, long reads and transactions together.

        `wait`: seconds that a request waits for connections and locks in all. Then it is a `psycopg_pool.PoolTimeout`
        or `psycopg.errors.LockNotAvailable`.
        `deadline`: seconds that a server may be silent while it owes an answer; half of it for a single write, a third
        for a short read. A server that works ends each statement sooner by itself.
        """
        if size < LEAST_SIZE:
            raise ValueError(f"a pool has at least {LEAST_SIZE} connections, not {size}")
        url = with_keepalives(url)
        readers, writers = max(1, size // 5), max(2, size * 2 // 5)
        searchers = (size - readers - writers) // 2
        lent = size - readers - writers - searchers
        options: dict[str, Any] = {
            "autocommit": True,
            "row_factory": dict_row,
            "prepare_threshold": 5 if prepare else None,
            "application_name": "resource-server",
            "connect_timeout": 5,
        }

        async def connect() -> Connection:
            connection = await AsyncConnection.connect(url, **options)
            await _configure(connection)
            return connection

        self.prepare = prepare
        self.size: Final = size
        self.wires = Wires(
            connect,
            readers=readers,
            writers=writers,
            searchers=searchers,
            prepare=prepare,
            wait=wait,
            deadline=deadline,
        )
        # As many transactions as there are connections but one may wait for a lock for long.
        self._patient = asyncio.Semaphore(max(1, lent - 1))
        # Of one person they leave a connection to others, too. They would wait for each other's locks anyway.
        self._most_apiece = max(1, lent - 1)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._impatient = 0
        self._connect = connect
        self._wait = wait
        self._deadline = deadline
        self._lent: dict[Connection, float] = {}  # with the time of the last answer
        self._pool = AsyncConnectionPool(
            url,
            connection_class=Connection,
            min_size=lent,
            max_size=lent,
            timeout=wait,
            # Attempts come ever less often until they are given up; then the next request starts anew.
            reconnect_timeout=5,
            configure=_configure,
            open=False,
            kwargs=options,
        )

    async def __aenter__(self) -> Self:
        await self._pool.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.wires.close()
        await self._pool.close()

    @property
    def in_use(self) -> int:
        """Connections on which there is work."""
        return len(self._lent) + self.wires.in_use

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection."""
        waiting: int = self._pool.get_stats().get("requests_waiting", 0)
        return waiting + self._impatient + self.wires.waiting

    def until(self) -> float:
        """When a request that begins now stops waiting for connections and locks, by the loop's clock."""
        return asyncio.get_running_loop().time() + self._wait

    def probe(self, deadline: float) -> "Probe":
        """A connection that is not one of the `size`. `deadline`: as of the pool."""
        return Probe(Wire(self._connect, prepare=self.prepare, deadline=deadline))

    @asynccontextmanager
    async def connection(self, until: float | None = None) -> AsyncIterator[Connection]:
        """A connection as the login role, for the executor, and for statements that read no rows with an owner.

        `until`: when the request stops waiting for it, by the loop's clock. The connection is cut if the server is
        silent for longer than the deadline, and closed if it has become useless. Raises `psycopg.OperationalError`; its
        subclass `psycopg_pool.PoolTimeout` means that all connections are in use.
        """
        loop = asyncio.get_running_loop()
        try:
            async with self._borrowed(self.until() if until is None else until) as connection:
                watch = None

                def look() -> None:
                    nonlocal watch
                    left = self._lent[connection] + self._deadline - loop.time()
                    if left > 0:
                        watch = loop.call_later(left, look)
                    else:
                        cut(connection)

                self.heard(connection)
                watch = loop.call_later(self._deadline, look)
                try:
                    yield connection
                except _STALE_CONNECTION:
                    await connection.close()
                    raise
                finally:
                    watch.cancel()
                    del self._lent[connection]
        except PoolTimeout as error:
            if self._lent:
                raise
            raise psycopg.OperationalError("there is no connection to wait for") from error

    def heard(self, connection: Connection) -> None:
        """The server has answered on a connection that is lent: its deadline starts again."""
        self._lent[connection] = asyncio.get_running_loop().time()

    def patience(self, until: float) -> AbstractAsyncContextManager[None]:
        """The right to wait for a lock while holding a connection. Raises `psycopg_pool.PoolTimeout`."""
        return self._granted(self._patient, until)

    @asynccontextmanager
    async def turn(self, actor: Actor, until: float) -> AsyncIterator[None]:
        """The right of a person to have a transaction. Raises `psycopg_pool.PoolTimeout`."""
        if not actor.id:
            yield
            return
        turns = self._turns.get(actor.id)
        if turns is None:
            turns = self._turns[actor.id] = asyncio.Semaphore(self._most_apiece)
        async with self._granted(turns, until):
            yield

    @asynccontextmanager
    async def _granted(self, right: asyncio.Semaphore, until: float) -> AsyncIterator[None]:
        self._impatient += 1
        try:
            async with asyncio.timeout_at(until):
                await right.acquire()
        except TimeoutError as error:
            raise PoolTimeout("every connection is in use") from error
        finally:
            self._impatient -= 1
        try:
            yield
        finally:
            right.release()

    @property
    def has_patience(self) -> bool:
        """Whether `patience` would be granted at once."""
        return not self._patient.locked()

    @asynccontextmanager
    async def _borrowed(self, until: float) -> AsyncIterator[Connection]:
        """One that a restart of the server has not ended.

        The pool's own check waits for a second after the first that is dead, and for two after the next.
        """
        loop = asyncio.get_running_loop()
        for _ in range(self._pool.max_size):
            connection = await self._pool.getconn(max(0.0, until - loop.time()))
            if is_alive(connection.pgconn):
                break
            await connection.close()
            await self._pool.putconn(connection)  # which opens another in its place
        else:
            connection = await self._pool.getconn(max(0.0, until - loop.time()))
        try:
            async with connection:
                yield connection
        finally:
            await self._pool.putconn(connection)


class Probe:
    """A connection for statements that read no rows with an owner. It opens at first use, and again after a loss."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def rows(self, sql: LiteralString) -> list[Row]:
        """Run a statement as the login role, for at most 1 s. Raises `psycopg.Error`."""
        return await self._wire.run(Job(_PROBE, ("1s", "1s"), sql, ()))

    async def close(self) -> None:
        await self._wire.close()


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
        self._pool.heard(self._connection)
        return await cursor.fetchall() if cursor.description else []

    async def row(self, statement: Statement, **values: object) -> Row | None:
        return next(iter(await self.rows(statement, **values)), None)


class Database:
    """The pool, seen by one actor.

    A deadlock, a serialisation failure or a stale connection is tried once more; then it is the caller's
    `psycopg.Error`.
    """

    def __init__(self, pool: Pool, actor: Actor) -> None:
        self._pool = pool
        self._actor = actor

    async def rows(self, statement: Statement, **values: object) -> list[Row]:
        """Run one statement in one round trip: a write in a transaction of its own, committed on return."""
        try:
            return await self._rows(statement, values)
        except _WORTH_A_SECOND_TRY as error:
            await _pause_after(error)
            return await self._rows(statement, values)

    async def row(self, statement: Statement, **values: object) -> Row | None:
        rows = await self.rows(statement, **values)
        return rows[0] if rows else None

    async def transact(self, work: Callable[[Transaction], Awaitable[T]], *, asked_by: Actor | None = None) -> T:
        """Run `work` in one transaction, committed on return.

        It may be called several times, so it must touch nothing else. `asked_by`: whose turn it takes, if that is
        another than the actor.
        """
        until = self._pool.until()
        async with self._pool.turn(asked_by or self._actor, until):
            try:
                return await self._transact(work, until)
            except _WORTH_A_SECOND_TRY as error:
                await _pause_after(error)
                return await self._transact(work, until)

    async def _rows(self, statement: Statement, values: Mapping[str, object]) -> list[Row]:
        wires, bound = self._pool.wires, statement.bind(self._actor, values)
        try:
            if statement.cost is Cost.long:
                return await wires.search(statement.become, self._actor, statement.sql, bound)
            if statement.writes:
                return await wires.write(statement.become, self._actor, statement.sql, bound)
            return await wires.read(statement.become, self._actor, statement.sql, bound, alone=_READ_ALONE)
        except UnreadableRow as error:
            # What is stored is not the client's mistake, whoever stored it.
            raise RuntimeError("a stored value cannot be read") from error

    async def _transact(self, work: Callable[[Transaction], Awaitable[T]], until: float) -> T:
        pool = self._pool
        if not pool.has_patience:
            # The last connection is not for waiting: other transactions may need no lock.
            with suppress(LockNotAvailable):
                return await self._attempt(work, until, patient=False)
        async with pool.patience(until):
            return await self._attempt(work, until, patient=True)

    async def _attempt(self, work: Callable[[Transaction], Awaitable[T]], until: float, *, patient: bool) -> T:
        pool = self._pool
        async with pool.connection(until) as connection, connection.transaction():
            lock_timeout = what_is_left(until) if patient else BRIEFLY
            await AsyncRawCursor(connection).execute(_TRANSACT, (*self._actor, lock_timeout), prepare=pool.prepare)
            return await work(Transaction(pool, connection, self._actor))


async def _pause_after(error: Exception) -> None:
    if isinstance(error, _BEATEN):
        await asyncio.sleep(_PAUSE)


def parameters(names: Iterable[str]) -> dict[str, Any]:
    """For `values()`: each column set from the parameter of its name."""
    return {name: bindparam(name) for name in names}


def with_keepalives(url: str) -> str:
    """A conninfo with which libpq notices a server that is gone; what the URL says of that itself is kept."""
    given = conninfo_to_dict(url)
    return make_conninfo(url, **{name: value for name, value in _KEEPALIVES.items() if name not in given})


async def _configure(connection: Connection) -> None:
    # psycopg reads times in the zone that the server last reported, which a transaction's own setting is not.
    await connection.execute("SET timezone = 'UTC'")
    await connection.execute(NOTICE_DEAD_CLIENT, (connection.info.backend_pid,))


def cut(connection: Connection) -> None:
    """Let whoever waits see the connection end. To cancel politely would be to wait for a server that hangs."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as other:
        other.shutdown(socket.SHUT_RDWR)
