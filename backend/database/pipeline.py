"""The wire protocol of one open connection in libpq's pipeline mode: sends queries, and reads their results.

https://www.postgresql.org/docs/18/libpq-pipeline-mode.html
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum, auto
from itertools import takewhile
from typing import Literal

import psycopg
from psycopg import pq
from psycopg.errors import LockNotAvailable, error_from_result

from backend.database.prepared import PreparedStatements
from backend.database.query import Connection, ConnectionLost, Query, UnreadableRow, fail

_STUCK = 0.05  # seconds without a response after which no further reads are sent
_LOCKED = 1.0  # seconds after which a read that met a lock is tried on a shared connection again

_GOOD = frozenset({pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY})
_STALE = frozenset({b"0A000", b"26000"})
_LOCK_NOT_AVAILABLE = b"55P03"


class Sync(Enum):
    """The end of a transaction, among the queries that were sent."""

    POINT = auto()


class State(Enum):
    """Whether queued queries are sent."""

    OPEN = auto()  # at once
    HELD_BACK = auto()  # after the next response: the server has not responded to an earlier read for long
    CLOSED = auto()  # never; the queries that were sent have failed


class Pipeline:
    """An open connection. Queries move from the queue `unsent` to `sent`, and leave it when the server has responded.

    `sent` has the queries that the server has yet to confirm, in order, and a `Sync.POINT` behind each transaction. A
    result belongs to the first entry.

    With `reads`, all queries that are sent together share one transaction, which saves many small messages. Each is
    answered when its rows arrive. If one of them fails, the server skips those behind it: they are sent again, each
    in its own transaction. Without `reads`, each query is a transaction, and is answered after its commit.
    """

    def __init__(
        self,
        connection: Connection,
        unsent: deque[Query],
        *,
        prepare: bool,
        reads: bool,
        locked: dict[str, float],
        on_idle: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """`on_idle` is called when the last query has ended; `on_lost` with a reason, and must call `close`.

        `locked`: see `SharedConnection`. Raises `psycopg.Error`.
        """
        self._connection = connection  # which would close pgconn when it is collected
        self.pgconn = connection.pgconn
        self.pgconn.nonblocking = 1
        self.pgconn.enter_pipeline_mode()
        self._socket = self.pgconn.socket
        self._unsent = unsent
        self._reads = reads
        self._locked = locked
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._statements = PreparedStatements(connection, prepare=prepare)
        self.sent: deque[Query | Literal[Sync.POINT]] = deque()
        self.last_response = self._loop.time()
        self._state = State.OPEN
        self._is_writing = False  # the socket's buffer is full; the rest is flushed when it has space
        self._loop.add_reader(self._socket, self._read)

    def close(self, why: str) -> None:
        """Close the connection. The queries that were sent fail with `ConnectionLost`."""
        self._state = State.CLOSED
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self.pgconn.finish()
        lost = list(self.queries())
        self.sent.clear()
        fail(lost, ConnectionLost, why)

    def queries(self) -> Iterator[Query]:
        """The queries that were sent, in order."""
        return (query for query in self.sent if query is not Sync.POINT)

    def waiting_since(self) -> float:
        """When the query that has waited longest for the server was sent."""
        return next((query.since for query in self.queries()), self.last_response)

    def is_stuck(self) -> bool:
        """Whether a query was sent long ago, and the server has not responded since."""
        if not self.sent:
            return False
        long_ago = self._loop.time() - _STUCK
        return self.last_response < long_ago and self.waiting_since() < long_ago

    def send(self) -> None:
        """Send the queries in the queue, unless an earlier read takes long: then they are sent after its response."""
        if self._state is State.CLOSED:
            return
        if self._reads and self.sent and self.is_stuck():
            self._state = State.HELD_BACK
            return
        unsent = self._unsent
        try:
            while unsent:
                query = unsent.popleft()
                self._send_query(query)
                if self._reads and unsent and not (query.is_alone or unsent[0].is_alone):
                    self.pgconn.send_flush_request()  # else the server would respond to all of them at once
                else:
                    self._end_transaction()
        except psycopg.Error as error:
            self._on_lost(str(error))
            return
        if not self.sent:
            self._on_idle()
            return
        self._flush()

    def _send_query(self, query: Query) -> None:
        if query.future.done():
            return
        if self._locked and self._is_locked(query.sql):
            query.future.set_exception(LockNotAvailable("a table that the statement reads is locked"))
            return
        statements = self._statements
        try:
            preamble, bound = statements.bind(query)
        except Exception as error:  # noqa: BLE001  # a dumper may raise anything, and other queries must go on
            query.future.set_exception(error)
            return
        self.sent.append(query)
        statements.send(query, preamble)
        statements.send(query, bound)

    def _is_locked(self, sql: str) -> bool:
        until = self._locked.get(sql)
        if until is None or until > self._loop.time():
            return until is not None
        del self._locked[sql]
        return False

    def _end_transaction(self) -> None:
        if self.sent and self.sent[-1] is not Sync.POINT:
            self.sent.append(Sync.POINT)
            self.pgconn.pipeline_sync()

    def _flush(self) -> None:
        if self._state is State.CLOSED:
            return
        try:
            unfinished = self.pgconn.flush()
        except psycopg.OperationalError as error:
            self._on_lost(str(error))
            return
        if bool(unfinished) is not self._is_writing:
            self._is_writing = bool(unfinished)
            if unfinished:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        if self._state is State.CLOSED:
            return
        pgconn, sent, was_busy = self.pgconn, len(self.sent), bool(self.sent or self._unsent)
        self.last_response = self._loop.time()
        try:
            pgconn.consume_input()
            self._take_results()
            if sent and len(self.sent) == sent:
                # No query has ended. The server may have closed a connection with unread queries: a socket error, after
                # which uvloop calls the reader once and removes it. The first `consume_input` reads the server's
                # last message, and only this one the end of the stream.
                pgconn.consume_input()
                self._take_results()
        except psycopg.OperationalError as error:
            self._on_lost(str(error))
            return
        if pgconn.status == pq.ConnStatus.BAD:
            self._on_lost("the server closed the connection")
        elif self._state is State.HELD_BACK:
            self._state = State.OPEN
            self.send()
        elif was_busy and not (self.sent or self._unsent):
            self._on_idle()

    def _take_results(self) -> None:
        pgconn = self.pgconn
        while self.sent and not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                # It ends the results of one statement; those of the next may have arrived.
                if pgconn.is_busy():
                    break
                result = pgconn.get_result()
                if result is None:
                    break
            self._take(result)

    def _take(self, result: pq.abc.PGresult) -> None:
        status, query = result.status, self.sent[0]
        if status == pq.ExecStatus.PIPELINE_SYNC:
            self._close_transaction()
        elif query is Sync.POINT:
            pass  # an error that ends the connection after all queries were answered
        elif status in _GOOD:
            query.result = result
            del query.steps[0]
            if self._reads and not query.steps:
                self.sent.popleft()
                self._answer(query)
        elif status != pq.ExecStatus.PIPELINE_ABORTED and query.error is None:
            query.error = error_from_result(result)
            failed = takewhile(lambda entry: entry is not Sync.POINT, self.sent)
            self._statements.forget_unconfirmed(entry for entry in failed if entry is not Sync.POINT)
            if result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED) == b"FATAL":
                query.error = ConnectionLost(str(query.error))
            state = result.error_field(pq.DiagnosticField.SQLSTATE)
            if state in _STALE:
                self._statements.forget_stale(query)
            elif state == _LOCK_NOT_AVAILABLE and self._reads:
                self._locked[query.sql] = self.last_response + _LOCKED

    def _close_transaction(self) -> None:
        """Answer the queries of the transaction that are committed or failed; send those again that were skipped."""
        skipped: list[Query] = []
        while (query := self.sent.popleft()) is not Sync.POINT:
            if query.steps and query.error is None:
                query.steps = []
                query.since = self.last_response
                query.is_alone = True
                skipped.append(query)
            else:
                self._answer(query)
        if skipped:
            self._unsent.extendleft(reversed(skipped))
            self.send()

    def _answer(self, query: Query) -> None:
        if query.future.done():
            return
        if query.error is not None:
            query.future.set_exception(query.error)
            return
        try:
            query.future.set_result(self._statements.rows(query))
        except Exception as error:  # noqa: BLE001  # a loader may raise anything, and other queries must go on
            query.future.set_exception(UnreadableRow(str(error)))
