"""The lanes that statements take: shared connections for short reads, others for writes and for long reads."""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from math import inf
from typing import Any

import psycopg
from psycopg.errors import LockNotAvailable
from psycopg_pool import PoolTimeout

from backend.database.connection import SharedConnection
from backend.database.query import SHORT_LOCK_TIMEOUT, Connection, ConnectionLost, Query, Row, fail, lock_timeout

MAX_WAITING = 1000  # queries on one shared connection; in a lane, those that have met a lock, and those of the system
MAX_AT_ONCE = 2  # long reads of one user
MAX_WAITING_PER_USER = 256  # statements in the queue of one user in a lane; further ones are refused at once


class Lane:
    """Connections that run one statement at a time each, for statements that may take long or wait for a lock.

    A statement waits for a connection and for locks for `wait` seconds in all: the time left when it gets a connection
    is its lock_timeout. On the last free connection it waits for a lock for 50 ms only; then it is rolled back, and
    runs again on another connection. So statements that wait for locks never hold all connections, and statements that
    need none of these locks go on.

    There is a queue for statements that have met a lock, which come first, and one for each user.
    """

    def __init__(self, make: Callable[..., SharedConnection], size: int, *, wait: float, most: int) -> None:
        """`most`: statements of one user that run at once; then users take turns.

        Statements of the system take turns like those of one user, without these limits.
        """
        self.connections: Sequence[SharedConnection] = [make(idle=self._end) for _ in range(size)]
        self._free = dict.fromkeys(self.connections)
        self._wait = wait
        self._most = most
        self._most_patient = max(1, size - 1)
        self._patient = 0  # running statements that may wait for a lock until their time is over
        self._started: dict[SharedConnection, Query] = {}
        self._running: Counter[str] = Counter()  # by user
        self._queues: dict[str, deque[Query]] = {}  # by user, in the order of their turns
        self._blocked: deque[Query] = deque()  # statements that have met a lock
        self._timer: asyncio.TimerHandle | None = None  # for the next query to refuse
        self._timer_at = inf  # uvloop's handle of a time that is already due has no `when()`

    @property
    def in_use(self) -> int:
        return sum(len(connection) > 0 for connection in self.connections)

    @property
    def waiting(self) -> int:
        """The number of statements that have no connection yet."""
        return sum(not query.future.done() for query in self._queued())

    async def run(
        self,
        preamble: str,
        actor: tuple[str, str],
        sql: str,
        values: Sequence[Any],
        *,
        begun: float | None = None,
        is_blocked: bool = False,
    ) -> list[Row]:
        """The rows of a statement. `preamble` takes the actor and a lock_timeout.

        `begun`: when the request began to wait, if it has waited before. `is_blocked`: the statement has met a lock.
        Raises `PoolTimeout` if no connection is free in time.
        """
        query = Query(preamble, actor, sql, values, begun, loop=self._loop)
        query.is_blocked = is_blocked
        self._enter(query)
        try:
            return await query.future
        except LockNotAvailable:
            if query.is_patient:
                raise
        query = Query(preamble, actor, sql, values, query.begun, loop=self._loop)
        query.is_blocked = True
        self._enter(query)
        return await query.future

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        queued = list(self._queued())
        self._queues.clear()
        self._blocked.clear()
        fail(queued, psycopg.OperationalError, "the pool was closed")
        for connection in self.connections:
            await connection.close()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()  # a system call in Python 3.11

    def _user(self, query: Query) -> str:
        return query.texts[1]

    def _queued(self) -> Iterator[Query]:
        return chain(self._blocked, *self._queues.values())

    def _enter(self, query: Query) -> None:
        """Start a query, or queue it. Raises `PoolTimeout` if the queue is full."""
        if self._free and self._may_start(query):
            self._start(query)
            return
        queue = self._blocked if query.is_blocked else self._queues.setdefault(self._user(query), deque())
        if len(queue) >= (MAX_WAITING_PER_USER if self._user(query) and not query.is_blocked else MAX_WAITING):
            raise PoolTimeout("too many statements are waiting")
        queue.append(query)
        self._refuse_at(query.begun + self._wait)

    def _may_start(self, query: Query) -> bool:
        if query.is_blocked and self._patient >= self._most_patient:
            return False
        user = self._user(query)
        return not user or self._running[user] < self._most

    def _start(self, query: Query) -> None:
        """Run a query on the connection that was used last."""
        connection = next(reversed(self._free))
        del self._free[connection]
        self._started[connection] = query
        self._running[self._user(query)] += 1
        query.is_patient = self._patient < self._most_patient
        if query.is_patient:
            self._patient += 1
            query.texts = (*query.texts, lock_timeout(query.begun + self._wait - self._loop.time()))
        else:
            query.texts = (*query.texts, SHORT_LOCK_TIMEOUT)
        connection.run(query)

    def _end(self, connection: SharedConnection) -> None:
        """Run the next query on a connection that has become idle."""
        if len(connection):
            return
        query = self._started.pop(connection, None)
        if query is not None:
            self._patient -= query.is_patient
            user = self._user(query)
            self._running[user] -= 1
            if not self._running[user]:
                del self._running[user]
        self._free[connection] = None
        while self._free and (found := self._next()) is not None:
            self._start(found)

    def _next(self) -> Query | None:
        """Take the next query out of its queue: one that has met a lock, or one of the user whose turn it is."""
        for query in list(self._blocked):
            if query.future.done():
                self._blocked.remove(query)
            elif self._may_start(query):
                self._blocked.remove(query)
                return query
        for user, queue in list(self._queues.items()):
            while queue and queue[0].future.done():
                queue.popleft()
            found = queue.popleft() if queue and self._may_start(queue[0]) else None
            if found is not None or not queue:
                del self._queues[user]
            if found is not None:
                if queue:
                    self._queues[user] = queue
                return found
        return None

    def _refuse_at(self, moment: float) -> None:
        if moment == inf:
            return
        if self._timer is not None:
            if self._timer_at <= moment:
                return
            self._timer.cancel()
        self._timer_at = moment
        self._timer = self._loop.call_at(moment, self._refuse_late)

    def _refuse_late(self) -> None:
        self._timer = None
        now = self._loop.time()
        for query in self._queued():
            if query.begun + self._wait <= now and not query.future.done():
                query.future.set_exception(PoolTimeout("every connection is in use"))
        self._blocked = deque(query for query in self._blocked if not query.future.done())
        for user, queue in list(self._queues.items()):
            self._queues[user] = left = deque(query for query in queue if not query.future.done())
            if not left:
                del self._queues[user]
        self._refuse_at(min((query.begun for query in self._queued()), default=inf) + self._wait)


class Lanes:
    """Shared connections for short reads, and two lanes: one for writes, one for long reads.

    A write may wait for a lock, so no other statement is sent behind it. The writes of one user leave one connection to
    others. A short read that meets a lock leaves the shared connection, and waits for the lock in the lane for writes.
    A read is sent again if its connection was lost; a write is not, since it may have been committed.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        *,
        readers: int,
        writers: int,
        searchers: int = 1,
        prepare: bool,
        wait: float,
        deadline: float,
    ) -> None:
        """`searchers`: connections for long reads. One user never gets all of them, unless there is only one.

        `wait`: seconds that a statement waits in queues and for locks; then it fails with `PoolTimeout` or
        `LockNotAvailable`.
        `deadline`: seconds without a response after which a connection for long reads is closed; half of it for a
        connection for writes, a third for a shared one.
        """
        make = partial(SharedConnection, connect, prepare=prepare, wait=wait)
        self._wait = wait
        self._locked: dict[str, float] = {}
        self.readers = [make(reads=True, deadline=deadline / 3, locked=self._locked) for _ in range(readers)]
        self.writing = Lane(partial(make, deadline=deadline / 2), writers, wait=wait, most=max(1, writers - 1))
        most = min(MAX_AT_ONCE, max(1, searchers - 1))
        self.searching = Lane(partial(make, deadline=deadline), searchers, wait=wait, most=most)
        self.write = self.writing.run

    @property
    def in_use(self) -> int:
        return sum(len(reader) > 0 for reader in self.readers) + self.writing.in_use + self.searching.in_use

    @property
    def waiting(self) -> int:
        """The number of statements that have no connection yet, or whose connection is busy with another for long."""
        return sum(reader.waiting for reader in self.readers) + self.writing.waiting + self.searching.waiting

    async def read(
        self, preamble: str, actor: tuple[str, str], sql: str, values: Sequence[Any], *, alone: str | None = None
    ) -> list[Row]:
        """The rows of a short read. It is sent again if its connection was lost.

        `alone` replaces `preamble` if the statement meets a lock; its third parameter is a lock_timeout.
        """
        query = Query(preamble, actor, sql, values, loop=self._loop)
        begun = query.begun
        for left in range(len(self.readers), -1, -1):
            try:
                return await self._reader().run(query)
            except ConnectionLost:
                if not left or self._loop.time() >= begun + self._wait:
                    raise
            except LockNotAvailable:
                if alone is None:
                    raise
                break
            query = Query(preamble, actor, sql, values, begun, loop=self._loop)
        assert alone is not None
        rows = await self.write(alone, actor, sql, values, begun=begun, is_blocked=True)
        self._locked.pop(sql, None)
        return rows

    async def search(self, preamble: str, actor: tuple[str, str], sql: str, values: Sequence[Any]) -> list[Row]:
        """The rows of a long read. It is sent once more if its connection was lost."""
        begun = self._loop.time()
        try:
            return await self.searching.run(preamble, actor, sql, values, begun=begun)
        except ConnectionLost:
            if self._loop.time() >= begun + self._wait:
                raise
        return await self.searching.run(preamble, actor, sql, values, begun=begun)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()  # as above

    def _reader(self) -> SharedConnection:
        reader = min(self.readers, key=len)
        if reader.is_stuck():
            reader = min(self.readers, key=lambda reader: (reader.is_stuck(), len(reader)))
        if len(reader) >= MAX_WAITING:
            raise PoolTimeout("too many statements are waiting")
        return reader

    async def close(self) -> None:
        for reader in self.readers:
            await reader.close()
        await self.writing.close()
        await self.searching.close()
