"""A connection to PostgreSQL that many requests share: it connects, queues queries, and limits their time.

A pool lends a connection to one request at a time, and psycopg's cursors, locks and waits cost several times as much
as the statement. Here a request queues its statement on an open connection and awaits a future; the connection sends
queued statements together and receives several results in one read. `docs/performance.md` has the figures.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from math import inf

import psycopg
from psycopg import pq
from psycopg_pool import PoolTimeout

from backend.database.pipeline import Pipeline
from backend.database.query import Connection, Query, Row, fail

_PAUSE = 0.1  # seconds between two attempts to connect
_CHECK = 0.25  # seconds between two checks for queries that have waited too long


def is_alive(pgconn: pq.abc.PGconn) -> bool:
    """Whether the server has not closed an idle connection; no round trip."""
    try:
        pgconn.consume_input()  # reads what the server sent last
        pgconn.consume_input()  # reads the end of the stream behind it
    except psycopg.OperationalError:
        return False
    return True


class SharedConnection:
    """One connection, opened at its first use, and again after a loss.

    It is closed (`_pipeline` and `_connecting` are None), connecting, or open (`_pipeline` is set). The first query
    that arrives while it is closed begins to connect.

    Queries that are queued in one turn of the event loop are sent together at its end, each in its own transaction, or
    with `reads` in a shared one (see `Pipeline`). A lost connection fails the queries that were sent with
    `ConnectionLost`; queries that were not sent wait for the next connection. If it cannot be opened, they fail.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        *,
        prepare: bool,
        deadline: float,
        wait: float = inf,
        reads: bool = False,
        locked: dict[str, float] | None = None,
        idle: Callable[["SharedConnection"], None] = lambda _: None,
    ) -> None:
        """`deadline`: seconds that the server may take to respond; then the connection is closed.

        `wait`: seconds that a query may be queued behind others; then it fails with `PoolTimeout`.
        `locked`: statements that met a lock lately, with the time until which they are refused at once, as
        `LockNotAvailable`. Several connections with `reads` may share it.
        `idle` is called when the last query has ended.
        """
        self._connect = connect
        self._idle = idle
        self._prepare = prepare
        self._deadline = deadline
        self._wait = wait
        self._reads = reads
        self._locked = {} if locked is None else locked
        self._pipeline: Pipeline | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unsent: deque[Query] = deque()
        self._watchdog: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """The length of its queues: unsent queries, sent queries and ends of transactions."""
        return len(self._unsent) + (0 if self._pipeline is None else len(self._pipeline.sent))

    def is_stuck(self) -> bool:
        """Whether a query was sent long ago, and the server has not responded since."""
        pipeline = self._pipeline
        return pipeline is not None and bool(pipeline.sent) and pipeline.is_stuck()

    @property
    def waiting(self) -> int:
        """The number of queries that wait for a connection, or for the query in front of them if that takes long."""
        if self._pipeline is not None and not self.is_stuck():
            return 0
        return sum(not query.future.done() for query in self._queued())

    def _queued(self) -> Iterator[Query]:
        """The queries behind the one that the server is working on."""
        sent = () if self._pipeline is None else islice(self._pipeline.queries(), 1, None)
        return chain(sent, self._unsent)

    def run(self, query: Query) -> asyncio.Future[list[Row]]:
        """Queue a query. Cancelling the returned future does not cancel the statement or affect other requests.

        Errors are `psycopg.Error`. `ConnectionLost` means that the statement may or may not have taken effect.
        """
        loop = query.future.get_loop()  # asking for the running loop is a system call
        query.since = loop.time()
        pipeline = self._pipeline
        is_idle = pipeline is not None and not (pipeline.sent or self._unsent) and pipeline.last_response < query.since
        if is_idle and pipeline is not None and not is_alive(pipeline.pgconn):
            self._disconnect("the server closed the connection")
        self._unsent.append(query)
        if self._watchdog is None:
            self._watchdog = loop.call_later(min(self._deadline, _CHECK), self._check)
        if self._pipeline is None:
            self._begin_to_connect()
        elif len(self._unsent) == 1:
            loop.call_soon(self._pipeline.send)
        return query.future

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            with suppress(asyncio.CancelledError):
                await self._connecting
            self._connecting = None
        self._fail_unsent("the pool was closed")
        self._disconnect("the pool was closed")
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None

    def _begin_to_connect(self) -> None:
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._open(), name="connect to PostgreSQL")

    async def _open(self) -> None:
        while True:
            try:
                pipeline = Pipeline(
                    await self._connect(),
                    self._unsent,
                    prepare=self._prepare,
                    reads=self._reads,
                    locked=self._locked,
                    on_idle=partial(self._idle, self),
                    on_lost=self._disconnect,
                )
            except psycopg.Error as error:
                self._fail_unsent(str(error))
                self._idle(self)
            else:
                break
            # Queries that are queued in the meantime wait for the next attempt.
            await asyncio.sleep(_PAUSE)
            if not self._unsent:
                self._connecting = None
                return
        self._connecting = None
        self._pipeline = pipeline
        pipeline.send()

    def _disconnect(self, why: str) -> None:
        was_busy = len(self) > 0
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close(why)
        if self._unsent:
            self._begin_to_connect()
        elif was_busy:
            self._idle(self)

    def _fail_unsent(self, why: str) -> None:
        """Fail the queries that were not sent: it is certain that they have had no effect."""
        fail(self._unsent, psycopg.OperationalError, why)
        self._unsent.clear()

    def _check(self) -> None:
        """Refuse queries that have waited too long, and close the connection if the server does not respond."""
        loop = asyncio.get_running_loop()
        self._watchdog, now, left = None, loop.time(), self._deadline
        self._refuse_late(now)
        pipeline = self._pipeline
        if pipeline is not None and pipeline.sent:
            left = max(pipeline.last_response, pipeline.waiting_since()) + self._deadline - now
            if left <= 0:
                self._disconnect("the server did not answer in time")
                left = self._deadline
        if len(self) and self._watchdog is None:
            self._watchdog = loop.call_later(min(left, _CHECK), self._check)

    def _refuse_late(self, now: float) -> None:
        for query in self._queued():
            if query.begun + self._wait <= now and not query.future.done():
                if self._pipeline is None:
                    query.future.set_exception(psycopg.OperationalError("there is no connection yet"))
                else:
                    query.future.set_exception(PoolTimeout("the statements before it take too long"))
