"""Connections to PostgreSQL that many requests share: statements are pipelined, and sent together.

A pool lends a connection to a request, which waits for a round trip and gives it back: psycopg's cursors, locks and
waits cost several times what the statement does. Here a request leaves its statement on a connection that is open, and
is told when the answer is there; nobody waits for the answer of another, and several answers come back in one read
(https://www.postgresql.org/docs/18/libpq-pipeline-mode.html). `docs/performance.md` has the figures.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, pq
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg_pool import PoolTimeout

Row = dict[str, Any]
Connection = AsyncConnection[Row]
Rows = asyncio.Future[list[Row]]

MOST_WAITING = 1000  # on one connection; whoever comes on top is refused at once
MOST_PREPARED = 500  # statements on one connection, some kB each in the server
_PAUSE = 0.1  # seconds between two attempts to connect
_STUCK = 0.05  # seconds: nobody queues up behind one who has waited this long, if there is another way
_TEXTS = (25, 25)  # the oid of the type
_AS_TEXT = (pq.Format.TEXT, pq.Format.TEXT)

_GOOD = frozenset({pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY})
_STALE = frozenset({b"0A000", b"26000"})


class ConnectionLost(psycopg.OperationalError):
    """The connection went while a statement was under way: whether it was done is not known."""


_Key = tuple[str, tuple[int, ...]]


class UnreadableRow(psycopg.DataError):
    """What the server answered has no equal in Python, as a time `infinity` has none."""


class _Bound(NamedTuple):
    """A statement with its values, as they go over the wire."""

    sql: str
    values: Sequence[Buffer | None]
    types: tuple[int, ...]
    formats: Sequence[pq.Format]


class _Prepared:
    """A statement as one connection knows it; it learns from the first answer how to make rows."""

    __slots__ = ("make_row", "name")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.make_row: Callable[[Sequence[Any]], Row] | None = None


class Job:
    """A statement on its way, behind another that says as whom. Whoever waits for it gets its rows, or the first error.

    The other takes two texts, and sets whatever it sets for the whole of a job: in one transaction it may come behind
    somebody else's. The parameters of both are `$1`, `$2`, ... On each connection a text is prepared once for each
    choice of types.
    """

    __slots__ = ("alone", "before", "error", "result", "rows", "since", "sql", "statement", "steps", "texts", "values")

    def __init__(self, before: str, texts: tuple[str, str], sql: str, values: Sequence[Any]) -> None:
        loop = asyncio.get_running_loop()
        self.before = before
        self.texts = texts
        self.sql = sql
        self.values = values
        self.rows: Rows = loop.create_future()
        self.since = loop.time()  # when it began to wait where it is now
        self.alone = False  # it shares no transaction
        # What the server has yet to say yes to, the next one last: preparing (what), or running (None).
        self.steps: list[_Key | None] = []
        self.statement: _Prepared
        self.result: pq.abc.PGresult | None = None
        self.error: psycopg.Error | None = None


def is_alive(pgconn: pq.abc.PGconn) -> bool:
    """Whether the server has not gone while nobody was looking: no round trip."""
    try:
        pgconn.consume_input()  # what it said at last
        pgconn.consume_input()  # that it said no more
    except psycopg.OperationalError:
        return False
    return True


class Wire:
    """One connection: opened when it is first needed, and again after it was lost.

    What comes in one turn of the loop is sent at its end, each job as a transaction of its own, which is answered when
    it has been committed. Where all only read (`reads`), what is sent together is one transaction, which spares both
    ends many small messages: each is answered when its rows are there, and whom somebody else's error has taken along
    is asked again, alone.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        *,
        prepare: bool,
        deadline: float,
        reads: bool = False,
        idle: Callable[["Wire"], None] = lambda _: None,
    ) -> None:
        """`deadline`: seconds until a server that does not answer is given up, and the connection with it.

        `idle` is called when the last job that was under way has ended.
        """
        self._connect = connect
        self._idle = idle
        self._prepare = prepare
        self._deadline = deadline
        self._reads = reads
        self._loop: asyncio.AbstractEventLoop
        self._pgconn: pq.abc.PGconn | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unsent: deque[Job] = deque()
        self._sent: deque[Job | None] = deque()  # None: here ends a transaction
        self._statements: dict[_Key, _Prepared] = {}
        self._number = 0
        self._heard = 0.0  # when the server last said something
        self._is_writing = False
        self._watch: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How much there is to wait for."""
        return len(self._unsent) + len(self._sent)

    def is_stuck(self) -> bool:
        """Whether the server has said nothing for long to somebody who has waited for as long."""
        if not self._sent:
            return False
        long_ago = self._loop.time() - _STUCK
        return self._heard < long_ago and self._since() < long_ago

    def _since(self) -> float:
        """When whoever has waited longest for the server began to."""
        return next((job.since for job in self._sent if job is not None), self._heard)

    def run(self, job: Job) -> Rows:
        """Begin a job. Who stops waiting for it is not told, and troubles nobody else.

        Errors are `psycopg.Error`; of those, `ConnectionLost` leaves open whether it was done.
        """
        loop = job.rows.get_loop()  # to ask for the running one is a system call
        job.since = loop.time()
        is_idle = not (self._sent or self._unsent) and self._heard < job.since
        if is_idle and self._pgconn is not None and not is_alive(self._pgconn):
            self._lose("the server closed the connection")
        self._unsent.append(job)
        if self._pgconn is None:
            self._begin_to_connect()
        elif len(self._unsent) == 1:
            loop.call_soon(self._send)
        return job.rows

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            with suppress(asyncio.CancelledError):
                await self._connecting
            self._connecting = None
        self._give_up("the pool was closed")
        self._lose("the pool was closed")

    def _begin_to_connect(self) -> None:
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._open(), name="connect to PostgreSQL")

    async def _open(self) -> None:
        while True:
            try:
                connection = await self._connect()
                pgconn = connection.pgconn
                pgconn.nonblocking = 1
                pgconn.enter_pipeline_mode()
                self._socket = pgconn.socket
            except psycopg.Error as error:
                self._give_up(str(error))
                self._idle(self)
            else:
                break
            # Whoever comes in the meantime waits for the next attempt.
            await asyncio.sleep(_PAUSE)
            if not self._unsent:
                self._connecting = None
                return
        self._connecting = None
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._pgconn = pgconn
        self._transformer = Transformer(connection)
        self._loop.add_reader(self._socket, self._read)
        self._send()

    def _send(self) -> None:
        pgconn = self._pgconn
        if pgconn is None:
            return
        try:
            while self._unsent:
                job = self._unsent.popleft()
                self._send_job(pgconn, job)
                if self._reads and self._unsent and not (job.alone or self._unsent[0].alone):
                    pgconn.send_flush_request()  # else the answer would wait for those of all
                else:
                    self._end_transaction(pgconn)
        except psycopg.Error as error:
            self._lose(str(error))
            return
        if not self._sent:
            self._idle(self)
            return
        self._flush()
        if self._watch is None:
            self._watch = self._loop.call_later(self._deadline, self._look)

    def _send_job(self, pgconn: pq.abc.PGconn, job: Job) -> None:
        if job.rows.done():
            return
        try:
            preamble = _Bound(job.before, [text.encode() for text in job.texts], _TEXTS, _AS_TEXT)
            bound = self._bind(job)
        except Exception as error:  # noqa: BLE001  # whatever a value does to its dumper is nobody else's
            job.rows.set_exception(error)
            return
        self._sent.append(job)
        self._send_part(pgconn, job, preamble)
        self._send_part(pgconn, job, bound)
        job.steps.reverse()

    def _end_transaction(self, pgconn: pq.abc.PGconn) -> None:
        if self._sent and self._sent[-1] is not None:
            self._sent.append(None)
            pgconn.pipeline_sync()

    def _bind(self, job: Job) -> _Bound:
        if not job.values:
            return _Bound(job.sql, (), (), ())
        transformer = self._transformer
        try:
            values = transformer.dump_sequence(job.values, [PyFormat.AUTO] * len(job.values))
        except UnicodeError as error:  # a lone surrogate
            raise psycopg.DataError("a text that cannot be encoded") from error
        return _Bound(job.sql, values, transformer.types or (), transformer.formats or ())

    def _send_part(self, pgconn: pq.abc.PGconn, job: Job, part: _Bound) -> None:
        key = part.sql, part.types
        statement = self._statements.get(key)
        if statement is None:
            if not self._prepare or len(self._statements) >= MOST_PREPARED:
                job.statement = _Prepared(b"")
                job.steps.append(None)
                pgconn.send_query_params(part.sql.encode(), part.values, part.types, part.formats, pq.Format.BINARY)
                return
            self._number += 1
            statement = self._statements[key] = _Prepared(b"wire_%d" % self._number)
            job.steps.append(key)
            pgconn.send_prepare(statement.name, part.sql.encode(), part.types)
        job.statement = statement
        job.steps.append(None)
        pgconn.send_query_prepared(statement.name, part.values, part.formats, pq.Format.BINARY)

    def _flush(self) -> None:
        if self._pgconn is None:
            return
        try:
            unfinished = self._pgconn.flush()
        except psycopg.OperationalError as error:
            self._lose(str(error))
            return
        if bool(unfinished) is not self._is_writing:
            self._is_writing = bool(unfinished)
            if unfinished:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        pgconn, was_busy = self._pgconn, len(self) > 0
        if pgconn is None:
            return
        self._heard = self._loop.time()
        try:
            pgconn.consume_input()
            while self._sent and not pgconn.is_busy():
                result = pgconn.get_result()
                if result is None:
                    # So ends one statement; the results of the next may be there.
                    if pgconn.is_busy():
                        break
                    result = pgconn.get_result()
                    if result is None:
                        break
                self._take(result)
        except psycopg.OperationalError as error:
            self._lose(str(error))
            return
        if pgconn.status == pq.ConnStatus.BAD:
            self._lose("the server closed the connection")
        elif was_busy and not len(self):
            self._idle(self)

    def _take(self, result: pq.abc.PGresult) -> None:
        status, job = result.status, self._sent[0]
        if status == pq.ExecStatus.PIPELINE_SYNC:
            self._close_transaction()
        elif job is None:
            pass  # an error that ends the connection, whose jobs have been answered
        elif status in _GOOD:
            job.result = result
            job.steps.pop()
            if self._reads and not job.steps:
                self._sent.popleft()
                self._answer(job)
        elif status != pq.ExecStatus.PIPELINE_ABORTED and job.error is None:
            job.error = error_from_result(result)
            if result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED) == b"FATAL":
                job.error = ConnectionLost(str(job.error))
            if result.error_field(pq.DiagnosticField.SQLSTATE) in _STALE:
                # Prepared before a migration, on another server of a pooler, or not at all, since an error came first.
                for key in [key for key in self._statements if key[0] in (job.before, job.sql)]:
                    del self._statements[key]

    def _close_transaction(self) -> None:
        """Whoever is not answered yet has been committed, or has an error, or was taken along by somebody else's."""
        taken_along: list[Job] = []
        for job in iter(self._sent.popleft, None):
            for key in job.steps:
                if key is not None:
                    self._statements.pop(key, None)
            if job.steps and job.error is None:
                job.steps = []
                job.since = self._heard
                job.alone = True
                taken_along.append(job)
            else:
                self._answer(job)
        if taken_along:
            self._unsent.extendleft(reversed(taken_along))
            self._send()

    def _answer(self, job: Job) -> None:
        if job.rows.done():
            return
        if job.error is not None:
            job.rows.set_exception(job.error)
            return
        try:
            job.rows.set_result(self._rows(job))
        except Exception as error:  # noqa: BLE001  # whatever it does to its loader is nobody else's
            job.rows.set_exception(UnreadableRow(str(error)))

    def _rows(self, job: Job) -> list[Row]:
        result, statement = job.result, job.statement
        if result is None or not result.nfields:
            return []
        if statement.make_row is None:
            names = [(result.fname(column) or b"").decode() for column in range(result.nfields)]
            statement.make_row = row_maker(names)
        self._transformer.set_pgresult(result)
        return self._transformer.load_rows(0, result.ntuples, statement.make_row)

    def _look(self) -> None:
        self._watch = None
        if self._sent:
            left = self._since() + self._deadline - self._loop.time()
            if left > 0:
                self._watch = self._loop.call_later(left, self._look)
            else:
                self._lose("the server did not answer in time")

    def _give_up(self, why: str) -> None:
        """On whoever was not sent: it is known not to be done."""
        unsent, self._unsent = self._unsent, deque()
        _fail(unsent, psycopg.OperationalError, why)

    def _lose(self, why: str) -> None:
        pgconn, self._pgconn = self._pgconn, None
        was_busy = len(self) > 0
        if pgconn is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._is_writing = False
            self._statements.clear()
            pgconn.finish()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        sent, self._sent = self._sent, deque()
        _fail(filter(None, sent), ConnectionLost, why)
        if self._unsent:
            self._begin_to_connect()
        elif was_busy:
            self._idle(self)


def row_maker(names: Sequence[str]) -> Callable[[Sequence[Any]], Row]:
    """What makes a row of its values: `dict(zip(names, values))` takes twice as long (`docs/performance.md`)."""
    pairs = ", ".join(f"{name!r}: values[{number}]" for number, name in enumerate(names))
    maker: Callable[[Sequence[Any]], Row] = eval(f"lambda values: {{{pairs}}}", {})  # noqa: S307  # of names as literals
    return maker


def _fail(jobs: Iterable[Job], kind: type[psycopg.OperationalError], why: str) -> None:
    for job in jobs:
        if not job.rows.done():
            job.rows.set_exception(kind(why))


class Wires:
    """Some connections for those who only read, who share them, and some for those who write, one at a time.

    Who writes may have to wait for another's lock, and nobody should wait behind them.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        *,
        readers: int,
        writers: int,
        prepare: bool,
        wait: float,
        deadline: float,
    ) -> None:
        """`wait`: seconds until a write that finds no connection free is a `PoolTimeout`."""
        make = partial(Wire, connect, prepare=prepare, deadline=deadline)
        self.readers = [make(reads=True) for _ in range(readers)]
        self.writers = [make(idle=self._next) for _ in range(writers)]
        self._free = dict.fromkeys(self.writers)
        self._queue: deque[Job] = deque()
        self._wait = wait
        self._patience: asyncio.TimerHandle | None = None

    @property
    def in_use(self) -> int:
        return sum(len(wire) > 0 for wire in (*self.readers, *self.writers))

    @property
    def waiting(self) -> int:
        """Those who want to write, and have no connection yet."""
        return sum(not job.rows.done() for job in self._queue)

    async def read(self, before: str, texts: tuple[str, str], sql: str, values: Sequence[Any]) -> list[Row]:
        """The rows of a statement that changes nothing: asked for again where a connection was lost."""
        for _ in self.readers:
            try:
                return await self._reader().run(Job(before, texts, sql, values))
            except ConnectionLost:
                continue
        return await self._reader().run(Job(before, texts, sql, values))

    def _reader(self) -> Wire:
        wire = min(self.readers, key=len)
        if wire.is_stuck():
            wire = min(self.readers, key=lambda wire: (wire.is_stuck(), len(wire)))
        if len(wire) >= MOST_WAITING:
            raise PoolTimeout("too many statements are waiting")
        return wire

    async def write(self, before: str, texts: tuple[str, str], sql: str, values: Sequence[Any]) -> list[Row]:
        job = Job(before, texts, sql, values)
        self._queue.append(job)
        if self._free:
            self._next(next(reversed(self._free)))
        elif self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(self._wait, self._lose_patience)
        return await job.rows

    def _next(self, wire: Wire) -> None:
        """Give a connection that has nothing to do to who has waited longest."""
        self._free.pop(wire, None)
        while self._queue and not len(wire):
            wire.run(self._queue.popleft())
        if not len(wire):
            self._free[wire] = None

    def _lose_patience(self) -> None:
        loop = asyncio.get_running_loop()
        self._patience = None
        while self._queue:
            job = self._queue[0]
            if not job.rows.done():
                if loop.time() < job.since + self._wait:
                    self._patience = loop.call_at(job.since + self._wait, self._lose_patience)
                    return
                job.rows.set_exception(PoolTimeout("every connection is in use"))
            self._queue.popleft()

    async def close(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        queue, self._queue = self._queue, deque()
        _fail(queue, psycopg.OperationalError, "the pool was closed")
        for wire in (*self.readers, *self.writers):
            await wire.close()
