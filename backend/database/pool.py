"""The connections of one process: shared ones for single statements, borrowed ones for transactions."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final, LiteralString, Self
from weakref import WeakValueDictionary

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import FeatureNotSupported, InvalidSqlStatementName
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from backend.database.connection import SharedConnection, is_alive
from backend.database.lanes import Lanes
from backend.database.query import Connection, Query, Row
from backend.database.statements import Actor

LEAST_SIZE = 5

_PROBE: LiteralString = "SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', $2, true)"

# Defaults for libpq; the URL takes precedence. A dead server is noticed after 11 s on an idle connection, and after 5 s
# if data was sent. In seconds; `tcp_user_timeout` in milliseconds.
_KEEPALIVES: dict[str, int] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5000,
}
# The same for the server, which otherwise keeps the session and the locks of a dead client for hours. Nothing is set
# behind a pooler, since other clients use its connections too. A pooler reports another process id than the server's.
NOTICE_DEAD_CLIENT: LiteralString = (
    "SELECT set_config('tcp_keepalives_idle', '5', false), set_config('tcp_keepalives_interval', '2', false),"
    " set_config('tcp_keepalives_count', '3', false), set_config('tcp_user_timeout', '5000', false)"
    " WHERE pg_backend_pid() = %s"
)

# The connection prepared the statement before a migration (0A000, "cached plan must not change result type") or on
# another server of a pooler (26000).
STALE_CONNECTION = (FeatureNotSupported, InvalidSqlStatementName)


class Pool:
    """The connections of this process. `async with` opens them; an unavailable server is noticed at first use."""

    def __init__(
        self, url: str, *, size: int = 12, prepare: bool = True, wait: float = 3.0, deadline: float = 12.0
    ) -> None:
        """`size`: connections for short reads, single writes, long reads and transactions together; 5 or more.

        `wait`: seconds that a request waits for connections and locks in all. Then it fails with
        `psycopg_pool.PoolTimeout` or `psycopg.errors.LockNotAvailable`.
        `deadline`: seconds without a response after which a transaction's or a long read's connection is closed; half
        of it for a single write, a third for a short read. The server's own timeouts are shorter.
        """
        if size < LEAST_SIZE:
            raise ValueError(f"a pool has at least {LEAST_SIZE} connections, not {size}")
        url = with_keepalives(url)
        readers, writers = max(1, size // 5), max(2, size * 2 // 5)
        searchers = (size - readers - writers) // 2
        borrowed = size - readers - writers - searchers
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
        self.lanes = Lanes(
            connect,
            readers=readers,
            writers=writers,
            searchers=searchers,
            prepare=prepare,
            wait=wait,
            deadline=deadline,
        )
        # Transactions on all borrowed connections but one may wait for a lock for the rest of their time.
        self._lock_permits = asyncio.Semaphore(max(1, borrowed - 1))
        # The transactions of one user leave a connection to others, too. They would wait for each other's locks anyway.
        self._most_per_user = max(1, borrowed - 1)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._waiting_for_permit = 0
        self._connect = connect
        self._wait = wait
        self._deadline = deadline
        self._last_response: dict[Connection, float] = {}  # of each borrowed connection
        self._pool = AsyncConnectionPool(
            url,
            connection_class=Connection,
            min_size=borrowed,
            max_size=borrowed,
            timeout=wait,
            # Attempts to reconnect become less frequent and stop after 5 s; the next request starts them again.
            reconnect_timeout=5,
            configure=_configure,
            open=False,
            kwargs=options,
        )

    async def __aenter__(self) -> Self:
        await self._pool.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.lanes.close()
        await self._pool.close()

    @property
    def in_use(self) -> int:
        """The number of connections that run a statement or a transaction."""
        return len(self._last_response) + self.lanes.in_use

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a connection."""
        waiting: int = self._pool.get_stats().get("requests_waiting", 0)
        return waiting + self._waiting_for_permit + self.lanes.waiting

    def until(self) -> float:
        """When a request that begins now stops waiting for connections and locks, by the loop's clock."""
        return asyncio.get_running_loop().time() + self._wait

    def probe(self, deadline: float) -> "Probe":
        """A connection that does not count towards `size`. `deadline`: as of the pool."""
        return Probe(SharedConnection(self._connect, prepare=self.prepare, deadline=deadline))

    @asynccontextmanager
    async def connection(self, until: float | None = None) -> AsyncIterator[Connection]:
        """Borrow a connection as the login role, for the executor, and for statements that read no user's rows.

        `until`: when the request stops waiting for it, by the loop's clock. The connection is cut if the server is
        silent for longer than the deadline, and closed if its prepared statements are stale. Raises
        `psycopg.OperationalError`; its subclass `psycopg_pool.PoolTimeout` means that all connections are in use.
        """
        loop = asyncio.get_running_loop()
        try:
            async with self._borrowed(self.until() if until is None else until) as connection:
                watchdog = None

                def check() -> None:
                    nonlocal watchdog
                    left = self._last_response[connection] + self._deadline - loop.time()
                    if left > 0:
                        watchdog = loop.call_later(left, check)
                    else:
                        cut(connection)

                self.note_response(connection)
                watchdog = loop.call_later(self._deadline, check)
                try:
                    yield connection
                except STALE_CONNECTION:
                    await connection.close()
                    raise
                finally:
                    watchdog.cancel()
                    del self._last_response[connection]
        except PoolTimeout as error:
            if self._last_response:
                raise
            raise psycopg.OperationalError("there is no connection to wait for") from error

    def note_response(self, connection: Connection) -> None:
        """Restart the deadline of a borrowed connection, because the server has responded."""
        self._last_response[connection] = asyncio.get_running_loop().time()

    def lock_permit(self, until: float) -> AbstractAsyncContextManager[None]:
        """Permission to wait for a lock while holding a connection. Raises `psycopg_pool.PoolTimeout`."""
        return self._granted(self._lock_permits, until)

    @asynccontextmanager
    async def turn(self, actor: Actor, until: float) -> AsyncIterator[None]:
        """Permission of a user to run a transaction. Raises `psycopg_pool.PoolTimeout`."""
        if not actor.id:
            yield
            return
        turns = self._turns.get(actor.id)
        if turns is None:
            turns = self._turns[actor.id] = asyncio.Semaphore(self._most_per_user)
        async with self._granted(turns, until):
            yield

    @asynccontextmanager
    async def _granted(self, permits: asyncio.Semaphore, until: float) -> AsyncIterator[None]:
        self._waiting_for_permit += 1
        try:
            async with asyncio.timeout_at(until):
                await permits.acquire()
        except TimeoutError as error:
            raise PoolTimeout("every connection is in use") from error
        finally:
            self._waiting_for_permit -= 1
        try:
            yield
        finally:
            permits.release()

    @property
    def has_lock_permit(self) -> bool:
        """Whether `lock_permit` would be granted at once."""
        return not self._lock_permits.locked()

    @asynccontextmanager
    async def _borrowed(self, until: float) -> AsyncIterator[Connection]:
        """A connection that a restart of the server has not ended.

        psycopg_pool's own check sleeps for one second after the first dead connection, and for two after the next.
        """
        loop = asyncio.get_running_loop()
        for _ in range(self._pool.max_size):
            connection = await self._pool.getconn(max(0.0, until - loop.time()))
            if is_alive(connection.pgconn):
                break
            await connection.close()
            await self._pool.putconn(connection)  # which opens a replacement
        else:
            connection = await self._pool.getconn(max(0.0, until - loop.time()))
        try:
            async with connection:
                yield connection
        finally:
            await self._pool.putconn(connection)


class Probe:
    """A connection for statements that read no user's rows. It opens at first use, and again after a loss."""

    def __init__(self, connection: SharedConnection) -> None:
        self._connection = connection

    async def rows(self, sql: LiteralString) -> list[Row]:
        """Run a statement as the login role, for at most 1 s. Raises `psycopg.Error`."""
        return await self._connection.run(Query(_PROBE, ("1s", "1s"), sql, ()))

    async def close(self) -> None:
        await self._connection.close()


def with_keepalives(url: str) -> str:
    """A conninfo with which libpq notices a dead server. Keepalive settings in the URL are kept."""
    given = conninfo_to_dict(url)
    return make_conninfo(url, **{name: value for name, value in _KEEPALIVES.items() if name not in given})


async def _configure(connection: Connection) -> None:
    # psycopg reads times in the zone that the server last reported; a transaction's own setting is not reported.
    await connection.execute("SET timezone = 'UTC'")
    await connection.execute(NOTICE_DEAD_CLIENT, (connection.info.backend_pid,))


def cut(connection: Connection) -> None:
    """Shut the socket down, so that a pending call fails. A cancel request would wait for a server that hangs."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as other:
        other.shutdown(socket.SHUT_RDWR)
