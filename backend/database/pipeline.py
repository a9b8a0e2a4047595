"""Connections to PostgreSQL that many requests share: statements are pipelined, and sent together.

A pool lends a connection to a request, which waits for a round trip and gives it back: psycopg's cursors, locks and
waits cost several times what the statement does. Here a request leaves its statement on a connection that is open, and
is told when the answer is there; nobody waits for the answer of another, and several answers come back in one read
(https://www.postgresql.org/docs/18/libpq-pipeline-mode.html). `docs/performance.md` has the figures.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, takewhile
from math import inf
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, pq
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import LockNotAvailable, error_from_result
from psycopg_pool import PoolTimeout

Row = dict[str, Any]
Connection = AsyncConnection[Row]
Rows = asyncio.Future[list[Row]]

MOST_WAITING = 1000  # on one connection; whoever comes on top is refused at once
MOST_AT_ONCE = 2  # statements of one person that may take long
MOST_WAITING_APIECE = 256  # of those, in the queue of one person
MOST_PREPARED = 500  # statements on one connection, some kB each in the server
_PAUSE = 0.1  # seconds between two attempts to connect
_STUCK = 0.05  # seconds: nobody queues up behind one who has waited this long, if there is another way
_CHECK = 0.25  # seconds between two checks for statements that have waited too long on a shared connection
BRIEFLY = "50ms"  # lock_timeout of a statement that must not hold the last free connection of a lane
_LOCKED = 1.0  # seconds after which a read that met a lock is tried on a shared connection again
_TEXTS = {count: (25,) * count for count in (2, 3)}  # the oid of the type, for each parameter
_AS_TEXT = {count: (pq.Format.TEXT,) * count for count in (2, 3)}

_GOOD = frozenset({pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY})
_STALE = frozenset({b"0A000", b"26000"})
_LOCK_NOT_AVAILABLE = b"55P03"


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

    The other takes two or three texts, and sets whatever it sets for the whole of a job: in one transaction it may come
    behind somebody else's. The parameters of both are `$1`, `$2`, ... On each connection a text is prepared once for
    each choice of types.
    """

    __slots__ = (
        "alone",
        "before",
        "begun",
        "blocked",
        "error",
        "patient",
        "result",
        "rows",
        "since",
        "sql",
        "statement",
        "steps",
        "texts",
        "values",
    )

    def __init__(
        self, before: str, texts: tuple[str, ...], sql: str, values: Sequence[Any], begun: float | None = None
    ) -> None:
        """`begun`: when the request began to wait, by the loop's clock, if that was for an earlier attempt."""
        loop = asyncio.get_running_loop()
        self.before = before
        self.texts = texts
        self.sql = sql
        self.values = values
        self.rows: Rows = loop.create_future()
        self.since = loop.time()  # when it began to wait where it is now
        self.begun = self.since if begun is None else begun
        self.alone = False  # it shares no transaction
        self.patient = True  # it may wait for a lock for as long as its time lasts
        self.blocked = False  # it has met a lock, so it is run only where it may be patient
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
    is asked again, alone. Behind a read that the server has not answered for 50 ms no more are sent.
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
        idle: Callable[["Wire"], None] = lambda _: None,
    ) -> None:
        """`deadline`: seconds that a server may be silent while it owes an answer; then the connection is given up.

        `wait`: seconds that a job may stand behind others; then it is refused with `PoolTimeout`.
        `locked`: statements that met a lock lately, with the time until which they are refused at once, as
        `LockNotAvailable`. Several connections with `reads` may share it.
        `idle` is called when the last job that was under way has ended.
        """
        self._connect = connect
        self._idle = idle
        self._prepare = prepare
        self._deadline = deadline
        self._wait = wait
        self._reads = reads
        self._locked = {} if locked is None else locked
        self._loop: asyncio.AbstractEventLoop
        self._pgconn: pq.abc.PGconn | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unsent: deque[Job] = deque()
        self._sent: deque[Job | None] = deque()  # None: here ends a transaction
        self._statements: dict[_Key, _Prepared] = {}
        self._number = 0
        self._heard = 0.0  # when the server last said something
        self._is_writing = False
        self._is_held_back = False
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

    @property
    def waiting(self) -> int:
        """Jobs that are not being worked on, if there is no connection yet or the server has been silent for long."""
        if self._pgconn is not None and not self.is_stuck():
            return 0
        return sum(not job.rows.done() for job in self._queued())

    def _since(self) -> float:
        """When whoever has waited longest for the server began to."""
        return next((job.since for job in self._sent if job is not None), self._heard)

    def _queued(self) -> Iterator[Job]:
        """The jobs behind the one that the server is working on."""
        sent = filter(None, self._sent)
        next(sent, None)
        return chain(sent, self._unsent)

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
        if self._watch is None:
            self._watch = loop.call_later(min(self._deadline, _CHECK), self._look)
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
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

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
        self._heard = self._loop.time()
        self._connection = connection
        self._pgconn = pgconn
        self._transformer = Transformer(connection)
        self._loop.add_reader(self._socket, self._read)
        self._send()

    def _send(self) -> None:
        pgconn = self._pgconn
        if pgconn is None:
            return
        if self._reads and self._sent and self.is_stuck():
            self._is_held_back = True
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

    def _send_job(self, pgconn: pq.abc.PGconn, job: Job) -> None:
        if job.rows.done():
            return
        if self._locked and self._is_locked(job.sql):
            job.rows.set_exception(LockNotAvailable("a table that the statement reads is locked"))
            return
        try:
            texts = [text.encode() for text in job.texts]
            preamble = _Bound(job.before, texts, _TEXTS[len(texts)], _AS_TEXT[len(texts)])
            bound = self._bind(job)
        except Exception as error:  # noqa: BLE001  # whatever a value does to its dumper is nobody else's
            job.rows.set_exception(error)
            return
        self._sent.append(job)
        self._send_part(pgconn, job, preamble)
        self._send_part(pgconn, job, bound)
        job.steps.reverse()

    def _is_locked(self, sql: str) -> bool:
        until = self._locked.get(sql)
        if until is None or until > self._loop.time():
            return until is not None
        del self._locked[sql]
        return False

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
        elif self._is_held_back:
            self._is_held_back = False
            self._send()
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
            self._forget_unprepared()
            if result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED) == b"FATAL":
                job.error = ConnectionLost(str(job.error))
            state = result.error_field(pq.DiagnosticField.SQLSTATE)
            if state in _STALE:
                self._forget_stale(job)
            elif state == _LOCK_NOT_AVAILABLE and self._reads:
                self._locked[job.sql] = self._heard + _LOCKED

    def _forget_unprepared(self) -> None:
        """The transaction has failed, so the server will not prepare what it has not prepared by now."""
        for job in takewhile(lambda job: job is not None, self._sent):
            for key in job.steps if job is not None else ():
                if key is not None:
                    self._statements.pop(key, None)

    def _forget_stale(self, job: Job) -> None:
        """The statement was prepared before a migration, on another server of a pooler, or not at all.

        One that was prepared again since the job was sent is kept.
        """
        statements = self._statements
        for key, statement in list(statements.items()):
            if key[0] == job.before or (key[0] == job.sql and statement is job.statement):
                del statements[key]

    def _close_transaction(self) -> None:
        """Whoever is not answered yet has been committed, or has an error, or was taken along by somebody else's."""
        taken_along: list[Job] = []
        for job in iter(self._sent.popleft, None):
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
        """Refuse jobs that have waited too long, and give up a server that has been silent for too long."""
        loop = asyncio.get_running_loop()
        self._watch, now, left = None, loop.time(), self._deadline
        self._refuse_late(now)
        if self._sent:
            left = max(self._heard, self._since()) + self._deadline - now
            if left <= 0:
                self._lose("the server did not answer in time")
                left = self._deadline
        if len(self) and self._watch is None:
            self._watch = loop.call_later(min(left, _CHECK), self._look)

    def _refuse_late(self, now: float) -> None:
        for job in self._queued():
            if job.begun + self._wait <= now and not job.rows.done():
                if self._pgconn is None:
                    job.rows.set_exception(psycopg.OperationalError("there is no connection yet"))
                else:
                    job.rows.set_exception(PoolTimeout("the statements before it take too long"))

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
            self._is_writing = self._is_held_back = False
            self._statements.clear()
            pgconn.finish()
        sent, self._sent = self._sent, deque()
        _fail(filter(None, sent), ConnectionLost, why)
        if self._unsent:
            self._begin_to_connect()
        elif was_busy:
            self._idle(self)


def what_is_left(until: float) -> str:
    """The time until a moment of the loop's clock, as PostgreSQL reads a lock_timeout; 0 would be no limit."""
    return f"{max(1, round(1000 * (until - asyncio.get_running_loop().time())))}ms"


def row_maker(names: Sequence[str]) -> Callable[[Sequence[Any]], Row]:
    """What makes a row of its values: `dict(zip(names, values))` takes twice as long (`docs/performance.md`)."""
    pairs = ", ".join(f"{name!r}: values[{number}]" for number, name in enumerate(names))
    maker: Callable[[Sequence[Any]], Row] = eval(f"lambda values: {{{pairs}}}", {})  # noqa: S307  # of names as literals
    return maker


def _fail(jobs: Iterable[Job], kind: type[psycopg.OperationalError], why: str) -> None:
    for job in jobs:
        if not job.rows.done():
            job.rows.set_exception(kind(why))


class Lane:
    """Connections that run one statement at a time each, for statements that may take long or wait for a lock.

    A statement waits for a connection and for locks for `wait` seconds in all: what is left when it gets a connection
    is its lock_timeout. The last free connection is an exception. A statement waits for a lock there for 50 ms, is
    rolled back, and runs again on another connection. So statements that wait for locks never hold all connections,
    and statements that need none of these locks go on.
    """

    def __init__(self, make: Callable[..., Wire], size: int, *, wait: float, most: int | None = None) -> None:
        """`most`: statements of one person that run at once, where persons take turns. None: one queue, no limit.

        Statements that run as nobody in particular take turns as one person does, without these limits.
        """
        self.wires: Sequence[Wire] = [make(idle=self._end) for _ in range(size)]
        self._free = dict.fromkeys(self.wires)
        self._wait = wait
        self._most = most
        self._most_patient = max(1, size - 1)
        self._patient = 0
        self._started: dict[Wire, Job] = {}
        self._running: Counter[str] = Counter()  # by person
        self._queues: dict[str, deque[Job]] = {}  # by person, in the order of their turns
        self._blocked: deque[Job] = deque()
        self._patience: asyncio.TimerHandle | None = None
        self._patience_ends = inf  # uvloop's handle of what is due at once does not tell its time

    @property
    def in_use(self) -> int:
        return sum(len(wire) > 0 for wire in self.wires)

    @property
    def waiting(self) -> int:
        """Statements that have no connection yet."""
        return sum(not job.rows.done() for job in self._queued())

    async def run(
        self,
        before: str,
        actor: tuple[str, str],
        sql: str,
        values: Sequence[Any],
        *,
        begun: float | None = None,
        blocked: bool = False,
    ) -> list[Row]:
        """The rows of a statement. `before` takes the actor and a lock_timeout.

        `begun`: when the request began to wait, if it has waited before. `blocked`: the statement has met a lock.
        Raises `PoolTimeout` if there is no connection in time.
        """
        job = Job(before, actor, sql, values, begun)
        job.blocked = blocked
        self._enter(job)
        try:
            return await job.rows
        except LockNotAvailable:
            if job.patient:
                raise
        job = Job(before, actor, sql, values, job.begun)
        job.blocked = True
        self._enter(job)
        return await job.rows

    async def close(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        queued = list(self._queued())
        self._queues.clear()
        self._blocked.clear()
        _fail(queued, psycopg.OperationalError, "the pool was closed")
        for wire in self.wires:
            await wire.close()

    def _person(self, job: Job) -> str:
        return job.texts[1] if self._most else ""

    def _queued(self) -> Iterator[Job]:
        return chain(self._blocked, *self._queues.values())

    def _enter(self, job: Job) -> None:
        if self._free and self._may_start(job):
            self._start(job)
            return
        queue = self._blocked if job.blocked else self._queues.setdefault(self._person(job), deque())
        if len(queue) >= (MOST_WAITING_APIECE if self._person(job) and not job.blocked else MOST_WAITING):
            raise PoolTimeout("too many statements are waiting")
        queue.append(job)
        self._refuse_at(job.begun + self._wait)

    def _may_start(self, job: Job) -> bool:
        if job.blocked and self._patient >= self._most_patient:
            return False
        person = self._person(job)
        return self._most is None or not person or self._running[person] < self._most

    def _start(self, job: Job) -> None:
        """Run a job on the connection that was used last."""
        wire = next(reversed(self._free))
        del self._free[wire]
        self._started[wire] = job
        if self._most is not None:
            self._running[self._person(job)] += 1
        job.patient = self._patient < self._most_patient
        if job.patient:
            self._patient += 1
            job.texts = (*job.texts, what_is_left(job.begun + self._wait))
        else:
            job.texts = (*job.texts, BRIEFLY)
        wire.run(job)

    def _end(self, wire: Wire) -> None:
        """A connection has nothing to do any more: run the next job on it."""
        if len(wire):
            return
        job = self._started.pop(wire, None)
        if job is not None:
            self._patient -= job.patient
            if self._most is not None:
                person = self._person(job)
                self._running[person] -= 1
                if not self._running[person]:
                    del self._running[person]
        self._free[wire] = None
        while self._free and (found := self._next()) is not None:
            self._start(found)

    def _next(self) -> Job | None:
        """The next job, taken out of its queue: one that has met a lock, or one of the person whose turn it is."""
        for job in list(self._blocked):
            if job.rows.done():
                self._blocked.remove(job)
            elif self._may_start(job):
                self._blocked.remove(job)
                return job
        for person, queue in list(self._queues.items()):
            while queue and queue[0].rows.done():
                queue.popleft()
            found = queue.popleft() if queue and self._may_start(queue[0]) else None
            if found is not None or not queue:
                del self._queues[person]
            if found is not None:
                if queue:
                    self._queues[person] = queue
                return found
        return None

    def _refuse_at(self, moment: float) -> None:
        if moment == inf:
            return
        if self._patience is not None:
            if self._patience_ends <= moment:
                return
            self._patience.cancel()
        self._patience_ends = moment
        self._patience = asyncio.get_running_loop().call_at(moment, self._refuse_late)

    def _refuse_late(self) -> None:
        self._patience = None
        now = asyncio.get_running_loop().time()
        for job in self._queued():
            if job.begun + self._wait <= now and not job.rows.done():
                job.rows.set_exception(PoolTimeout("every connection is in use"))
        self._blocked = deque(job for job in self._blocked if not job.rows.done())
        for person, queue in list(self._queues.items()):
            self._queues[person] = left = deque(job for job in queue if not job.rows.done())
            if not left:
                del self._queues[person]
        self._refuse_at(min((job.begun for job in self._queued()), default=inf) + self._wait)


class Wires:
    """Shared connections for short reads, and two lanes: one for writes, one for reads that may take long.

    A write may wait for a lock, so no other statement is sent behind it. One person's writes leave one connection to
    others. A short read that meets a lock leaves the shared connection, and goes on waiting in the lane for writes.
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
        """`searchers`: connections for reads that may take long. One person never gets all, unless there is one only.

        `wait`: seconds that a statement waits in queues and for locks; then it is a `PoolTimeout` or
        `LockNotAvailable`.
        `deadline`: seconds until a connection for long reads is given up that owes an answer and is silent; half of it
        for a connection for writes, a third for a shared one.
        """
        make = partial(Wire, connect, prepare=prepare, wait=wait)
        self._wait = wait
        self._locked: dict[str, float] = {}
        self.readers = [make(reads=True, deadline=deadline / 3, locked=self._locked) for _ in range(readers)]
        self.writing = Lane(partial(make, deadline=deadline / 2), writers, wait=wait, most=max(1, writers - 1))
        most = min(MOST_AT_ONCE, max(1, searchers - 1))
        self.searching = Lane(partial(make, deadline=deadline), searchers, wait=wait, most=most)
        self.write = self.writing.run

    @property
    def in_use(self) -> int:
        return sum(len(wire) > 0 for wire in self.readers) + self.writing.in_use + self.searching.in_use

    @property
    def waiting(self) -> int:
        """Statements that have no connection yet, or whose connection is busy with another one for long."""
        return sum(wire.waiting for wire in self.readers) + self.writing.waiting + self.searching.waiting

    async def read(
        self, before: str, actor: tuple[str, str], sql: str, values: Sequence[Any], *, alone: str | None = None
    ) -> list[Row]:
        """The rows of a statement that changes nothing: sent again if its connection was lost.

        `alone` takes the place of `before` if the statement meets a lock; its third parameter is a lock_timeout.
        """
        job = Job(before, actor, sql, values)
        begun = job.begun
        for left in range(len(self.readers), -1, -1):
            try:
                return await self._reader().run(job)
            except ConnectionLost:
                if not left or asyncio.get_running_loop().time() >= begun + self._wait:
                    raise
            except LockNotAvailable:
                if alone is None:
                    raise
                break
            job = Job(before, actor, sql, values, begun)
        assert alone is not None
        rows = await self.write(alone, actor, sql, values, begun=begun, blocked=True)
        self._locked.pop(sql, None)
        return rows

    async def search(self, before: str, actor: tuple[str, str], sql: str, values: Sequence[Any]) -> list[Row]:
        """The rows of a statement that changes nothing and may take long: sent once more if its connection was lost."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            return await self.searching.run(before, actor, sql, values, begun=begun)
        except ConnectionLost:
            if loop.time() >= begun + self._wait:
                raise
        return await self.searching.run(before, actor, sql, values, begun=begun)

    def _reader(self) -> Wire:
        wire = min(self.readers, key=len)
        if wire.is_stuck():
            wire = min(self.readers, key=lambda wire: (wire.is_stuck(), len(wire)))
        if len(wire) >= MOST_WAITING:
            raise PoolTimeout("too many statements are waiting")
        return wire

    async def close(self) -> None:
        for wire in self.readers:
            await wire.close()
        await self.writing.close()
        await self.searching.close()
