"""The shared connections: what one request meets is nobody else's, and what is lost comes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg_pool import PoolTimeout

from backend.database import Connection, UnreadableRow, connection, lanes, pipeline, prepared
from backend.database.connection import SharedConnection
from backend.database.job import ConnectionLost, Job
from backend.database.lanes import Lanes
from backend.database.pipeline import Pipeline
from backend.database.prepared import PreparedStatements
from tests.relay import Relay

NOTHING = "SELECT $1, $2"
BRIEFLY = "SELECT $1, set_config('lock_timeout', $2, true)"
AS_LONG_AS_IT_MAY = "SELECT $1, $2, set_config('lock_timeout', $3, true)"
PID = "SELECT pg_backend_pid() AS pid"


async def run(wire: SharedConnection, sql: str, *values: object) -> list[dict[str, Any]]:
    return await wire.run(Job(NOTHING, ("", ""), sql, values))


def prepared_on(wire: SharedConnection) -> list[str]:
    assert wire._pipeline is not None
    return [sql for sql, _ in wire._pipeline._statements._statements]


class Line:
    """A wire, and how often it was connected. `refusing`: what the next attempts meet."""

    def __init__(self, url: str, *, prepare: bool = True, deadline: float = 30, reads: bool = False) -> None:
        self.url = url
        self.attempts = 0
        self.wire = SharedConnection(self.connect, prepare=prepare, deadline=deadline, reads=reads)

    async def connect(self) -> Connection:
        self.attempts += 1
        return await psycopg.AsyncConnection.connect(
            self.url, autocommit=True, row_factory=dict_row, application_name="transport", connect_timeout=5
        )


@asynccontextmanager
async def line(url: str, **options: Any) -> AsyncIterator[Line]:
    line = Line(url, **options)
    try:
        yield line
    finally:
        await line.wire.close()


async def sent() -> None:
    """What was begun just now is on its way."""
    for _ in range(2):
        await asyncio.sleep(0)


@pytest.fixture(params=[False, True], ids=["any", "reads"])
async def wire(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[SharedConnection]:
    async with line(database_url, reads=request.param) as made:
        yield made.wire


@pytest.fixture
async def writer(database_url: str) -> AsyncIterator[SharedConnection]:
    async with line(database_url) as made:
        yield made.wire


@pytest.fixture
async def reader(database_url: str) -> AsyncIterator[SharedConnection]:
    async with line(database_url, reads=True) as made:
        yield made.wire


async def test_what_is_asked_together_is_answered_each_to_its_own(wire: SharedConnection) -> None:
    answers = await asyncio.gather(*(run(wire, "SELECT $1::int AS n", n) for n in range(300)))
    assert answers == [[{"n": n}] for n in range(300)]


async def test_a_column_may_have_any_name_and_the_last_of_one_name_counts(wire: SharedConnection) -> None:
    names = ["one", "a'b", 'a"b', "a\\n", "a{b}%s", "tür\N{GRINNING FACE}", "one"]
    columns = ", ".join(f"""{n} AS "{name.replace('"', '""')}\"""" for n, name in enumerate(names))
    for _ in range(2):
        assert await run(wire, f"SELECT {columns}") == [dict(zip(names, range(len(names)), strict=True))]
    assert await run(wire, "SELECT FROM (VALUES (1), (2)) AS two") == []


async def test_an_error_is_its_own_statements_alone(wire: SharedConnection) -> None:
    """Also where the statement is being prepared, and what comes behind it relies on that."""
    answers = await asyncio.gather(
        run(wire, "SELECT 1 AS one"),
        run(wire, "SELECT 1 / $1::int AS n", 0),
        run(wire, "SELECT 1 / $1::int AS n", 1),
        run(wire, "SELEC"),
        run(wire, "SELEC"),
        wire.run(Job("SELECT set_config('role', $1, true), $2", ("nobody_of_this_name", ""), "SELECT 2 AS two", ())),
        run(wire, "SELECT 1 AS one"),
        return_exceptions=True,
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [
        list,
        psycopg.errors.DivisionByZero,
        list,
        psycopg.errors.SyntaxError,
        psycopg.errors.InvalidSqlStatementName,  # of what the one before it failed to prepare: worth another try
        psycopg.errors.InvalidParameterValue,
        list,
    ]
    assert await run(wire, "SELECT 2 AS two") == [{"two": 2}]


async def test_whom_an_error_takes_along_is_asked_again(reader: SharedConnection) -> None:
    """Also where every second one of a transaction has an error of its own."""
    answers = await asyncio.gather(
        *(run(reader, "SELECT 1 / $1::int AS n", n % 2) for n in range(40)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [psycopg.errors.DivisionByZero, list] * 20


async def test_what_only_reads_is_one_transaction_with_what_is_sent_with_it(reader: SharedConnection) -> None:
    moment = "SELECT now() AS at"
    together = await asyncio.gather(*(run(reader, moment) for _ in range(5)))
    later = await run(reader, moment)
    assert [answer == together[0] for answer in (*together, later)] == [True] * 5 + [False]


async def test_who_reads_does_not_wait_for_who_comes_behind(wire: SharedConnection) -> None:
    await run(wire, "SELECT 1 AS one")
    quick = asyncio.ensure_future(run(wire, "SELECT 1 AS one"))
    slow = asyncio.ensure_future(run(wire, "SELECT pg_sleep(60)"))
    assert await quick == [{"one": 1}]
    assert not slow.done()
    slow.cancel()


async def test_each_is_a_transaction_of_its_own(writer: SharedConnection) -> None:
    table = f"t_{uuid4().hex}"
    await run(writer, f"CREATE TABLE {table} (n int CONSTRAINT {table}_late UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    insert = f"INSERT INTO {table} SELECT unnest($1::int[])"
    answers = await asyncio.gather(
        run(writer, insert, [1, 2]),
        run(writer, insert, [3, 3]),  # refused by the commit itself
        run(writer, insert, [4]),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [list, psycopg.errors.UniqueViolation, list]
    found = await run(writer, f"DELETE FROM {table} RETURNING n")  # noqa: S608
    assert sorted(row["n"] for row in found) == [1, 2, 4]
    await run(writer, f"DROP TABLE {table}")


class Unwritable:
    pass


@pytest.mark.parametrize(
    ("value", "error"),
    [("\0", psycopg.DataError), ("\ud800", psycopg.DataError), (Unwritable(), psycopg.ProgrammingError)],
)
async def test_a_value_that_nothing_can_hold_is_not_sent(
    wire: SharedConnection, value: object, error: type[Exception]
) -> None:
    """Nor does it hold up what was asked with it, whatever its dumper raises."""
    ask = "SELECT $1::text AS t"
    await run(wire, "SELECT 1")
    answers = await asyncio.gather(
        run(wire, ask, "a"), run(wire, ask, value), run(wire, ask, "b"), return_exceptions=True
    )
    assert [answers[0], type(answers[1]), answers[2]] == [[{"t": "a"}], error, [{"t": "b"}]]
    assert await run(wire, ask, "c") == [{"t": "c"}]


async def test_a_value_that_breaks_its_dumper_is_its_own_statements_error(
    wire: SharedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run(wire, "SELECT 1")

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    for step, error in (("bind", ZeroDivisionError), ("rows", UnreadableRow)):
        with monkeypatch.context() as broken:
            broken.setattr(PreparedStatements, step, fail)
            with pytest.raises(error):
                await asyncio.wait_for(run(wire, "SELECT 1"), 10)
    assert await run(wire, "SELECT 1 AS one") == [{"one": 1}]


async def test_who_was_taken_along_is_not_lost_with_the_connection(
    reader: SharedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends while they are sent again: the first of them was under way, the others never were."""
    await run(reader, "SELECT 1")
    end, calls = Pipeline._end_transaction, iter(range(10))

    def end_or_fail(self: Pipeline) -> None:
        if next(calls) == 1:
            raise psycopg.OperationalError("as if the server had gone")
        end(self)

    monkeypatch.setattr(Pipeline, "_end_transaction", end_or_fail)
    async with asyncio.timeout(20):
        answers = await asyncio.gather(
            run(reader, "SELECT 1 / 0"), *(run(reader, "SELECT 1 AS one") for _ in range(3)), return_exceptions=True
        )
    assert [type(answer) for answer in answers] == [psycopg.errors.DivisionByZero, ConnectionLost, list, list]


async def test_a_statement_that_was_not_prepared_after_all_is_not_taken_for_one_that_was(
    reader: SharedConnection,
) -> None:
    """An error kept it from being prepared, when others relied on it: they can be tried again, and nothing else is."""
    await run(reader, "SELECT 'known'")
    texts = "SELECT pg_sleep(0.2)", "SELECT 1 / 0", "SELECT 'new' AS it"
    first = [asyncio.ensure_future(run(reader, sql)) for sql in texts]
    await sent()
    relies = asyncio.ensure_future(run(reader, "SELECT 'new' AS it"))
    answers = await asyncio.gather(*first, relies, return_exceptions=True)
    assert [type(answer) for answer in answers] == [
        list,
        psycopg.errors.DivisionByZero,
        list,
        psycopg.errors.InvalidSqlStatementName,
    ]
    assert await run(reader, "SELECT 'new' AS it") == [{"it": "new"}]
    assert "SELECT 'known'" in prepared_on(reader)


@pytest.mark.parametrize("reads", [False, True])
async def test_a_statement_that_a_lock_kept_from_being_prepared_is_prepared_later(
    database_url: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same connection, whoever relied on it meanwhile."""
    monkeypatch.setattr(pipeline, "_LOCKED", 0.0)
    table = f"t_{uuid4().hex}"
    ask = f"SELECT count(*) AS n FROM {table}"  # noqa: S608
    async with (
        line(database_url, reads=reads) as made,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other,
    ):

        async def count() -> list[dict[str, Any]]:
            return await made.wire.run(Job(BRIEFLY, ("", "200ms"), ask, ()))

        await other.execute(f"CREATE TABLE {table} (n int)".encode())
        (pid,) = await run(made.wire, PID)
        async with other.transaction():
            await other.execute(f"LOCK TABLE {table}".encode())
            answers = await asyncio.gather(*(count() for _ in range(3)), return_exceptions=True)
            kinds = {type(answer) for answer in answers}
            assert psycopg.errors.LockNotAvailable in kinds
            assert kinds <= {psycopg.errors.LockNotAvailable, psycopg.errors.InvalidSqlStatementName}
            assert ask not in prepared_on(made.wire)
        assert await count() == [{"n": 0}]
        assert await run(made.wire, PID) == [pid]
        await other.execute(f"DROP TABLE {table}".encode())


async def test_a_read_that_met_a_lock_is_not_sent_again_for_a_while(
    reader: SharedConnection, database_url: str
) -> None:
    """Nor those that were sent with it: each would hold up whatever stands behind it."""
    table = f"t_{uuid4().hex}"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute(f"CREATE TABLE {table} (n int)".encode())
        await run(reader, PID)
        async with other.transaction():
            await other.execute(f"LOCK TABLE {table}".encode())
            ask = f"SELECT count(*) AS n FROM {table}"  # noqa: S608
            jobs = [reader.run(Job(BRIEFLY, ("", "300ms"), ask, ())) for _ in range(30)]
            free = asyncio.ensure_future(run(reader, "SELECT 1 AS one"))
            async with asyncio.timeout(6):  # thirty times 0.3 s would be more
                assert await free == [{"one": 1}]
                answers = await asyncio.gather(*jobs, return_exceptions=True)
        assert {type(answer) for answer in answers} == {psycopg.errors.LockNotAvailable}
        await other.execute(f"DROP TABLE {table}".encode())


async def test_nothing_more_is_sent_behind_a_read_that_takes_long(reader: SharedConnection) -> None:
    await run(reader, PID)
    slow = asyncio.ensure_future(run(reader, "SELECT pg_sleep(1)"))
    async with asyncio.timeout(20):
        while not reader.is_stuck():  # noqa: ASYNC110  # of time that passes there is no event
            await asyncio.sleep(0.01)
    behind = [asyncio.ensure_future(run(reader, "SELECT $1::int AS n", n)) for n in range(3)]
    await sent()
    assert (len(reader._unsent), reader.waiting) == (3, 3)
    assert await asyncio.gather(*behind) == [[{"n": n}] for n in range(3)]
    assert slow.done()
    assert reader.waiting == 0


@pytest.mark.parametrize("reads", [False, True])
async def test_a_connection_that_makes_progress_is_kept(database_url: str, reads: bool) -> None:
    """The deadline is that of one silence, however long the queue is."""
    async with line(database_url, reads=reads, deadline=1.5) as made:
        (pid,) = await run(made.wire, PID)
        answers = await asyncio.gather(*(run(made.wire, "SELECT pg_sleep(0.5)") for _ in range(5)))
        assert len(answers) == 5
        assert await run(made.wire, PID) == [pid]


async def test_who_stops_waiting_troubles_nobody(wire: SharedConnection) -> None:
    pid = (await run(wire, PID))[0]["pid"]
    slow = asyncio.ensure_future(run(wire, "SELECT pg_sleep(0.2)"))
    behind = asyncio.ensure_future(run(wire, "SELECT 'behind' AS who"))
    gone = asyncio.ensure_future(run(wire, "SELECT 'gone' AS who"))
    await sent()
    slow.cancel()
    gone.cancel()
    assert await behind == [{"who": "behind"}]
    with suppress(asyncio.CancelledError):
        await gone
    assert await run(wire, PID) == [{"pid": pid}]
    assert len(wire) <= int(wire._reads)  # at most the end of what was read


async def test_what_was_never_sent_is_not_done(database_url: str) -> None:
    """Cancelled while the connection was being opened."""
    async with line(database_url) as made:
        table = f"t_{uuid4().hex}"
        made_table = asyncio.ensure_future(run(made.wire, f"CREATE TABLE {table} (n int)"))
        await asyncio.sleep(0)
        made_table.cancel()
        assert await run(made.wire, "SELECT to_regclass($1) IS NULL AS absent", table) == [{"absent": True}]


async def test_a_lost_connection_fails_what_is_under_way_and_is_opened_again(database_url: str) -> None:
    async with line(database_url) as made:
        (row,) = await run(made.wire, PID)
        waiting = [asyncio.ensure_future(run(made.wire, "SELECT pg_sleep(60)")) for _ in range(3)]
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
            while not (
                await (
                    await other.execute(
                        "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active' AND query ~ 'pg_sleep'",
                        (row["pid"],),
                    )
                ).fetchone()
            ):
                pass
            await other.execute("SELECT pg_terminate_backend(%s)", (row["pid"],))
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(answer) for answer in answers] == [ConnectionLost] * 3
        assert (await run(made.wire, PID))[0]["pid"] != row["pid"]
        assert made.attempts == 2


async def test_a_connection_that_ended_while_idle_is_not_used(database_url: str) -> None:
    async with line(database_url) as made:
        (row,) = await run(made.wire, PID)
        with psycopg.connect(database_url, autocommit=True) as other:  # nothing else gets a turn meanwhile
            other.execute("SELECT pg_terminate_backend(%s, 5000)", (row["pid"],))
        assert (await run(made.wire, PID))[0]["pid"] != row["pid"]


@pytest.mark.parametrize("reads", [False, True])
async def test_what_was_not_sent_when_the_connection_was_lost_waits_for_the_next(
    database_url: str, reads: bool
) -> None:
    async with line(database_url, reads=reads) as made:
        (before,) = await run(made.wire, PID)
        waiting = [made.wire.run(Job(NOTHING, ("", ""), PID, ())) for _ in range(3)]
        made.wire._disconnect("as if the server had gone")
        answers = await asyncio.gather(*waiting)
        assert before not in [row for rows in answers for row in rows]
        assert made.attempts == 2


async def test_who_is_asked_again_has_the_whole_patience_again(database_url: str) -> None:
    async with line(database_url, reads=True, deadline=1.7) as made:
        (row,) = await run(made.wire, PID)
        answers = await asyncio.gather(
            run(made.wire, "SELECT 1 / (SELECT 0 FROM pg_sleep(1))"),
            run(made.wire, "SELECT pg_sleep(1)"),
            return_exceptions=True,
        )
        assert [type(answer) for answer in answers] == [psycopg.errors.DivisionByZero, list]
        assert await run(made.wire, PID) == [row]


async def test_a_server_that_hangs_is_left(database_url: str) -> None:
    async with Relay(database_url) as relay, line(relay.url, deadline=0.1) as made:
        assert await run(made.wire, "SELECT 1 AS one") == [{"one": 1}]
        relay.hang()
        answers = await asyncio.gather(run(made.wire, "SELECT 1"), run(made.wire, "SELECT 2"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ConnectionLost] * 2
        assert await run(made.wire, "SELECT 1 AS one") == [{"one": 1}]


async def test_a_server_that_is_down_is_an_error_at_once_and_asked_again_soon(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_PAUSE", 0.01)
    async with line("postgresql://nobody@127.0.0.1:9/nothing") as made:
        for _ in range(3):
            answers = await asyncio.gather(*(run(made.wire, "SELECT 1") for _ in range(5)), return_exceptions=True)
            assert {type(answer) for answer in answers} == {psycopg.OperationalError}
        assert made.attempts == 3
        made.url = database_url
        assert await run(made.wire, "SELECT 1 AS one") == [{"one": 1}]


async def test_statements_are_prepared_once_and_only_so_many(
    wire: SharedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = "SELECT count(*) AS n FROM pg_prepared_statements"
    for _ in range(3):
        await run(wire, "SELECT $1::int / $2::int", 1, 1)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await run(wire, "SELECT $1::int / $2::int", 1, 0)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await run(wire, "SELECT 2 / 0")
    assert await run(wire, count) == [{"n": 4}]
    monkeypatch.setattr(prepared, "MAX_PREPARED", 4)
    assert await run(wire, "SELECT 'one more' AS t") == [{"t": "one more"}]
    assert await run(wire, count) == [{"n": 4}]


async def test_behind_a_pooler_nothing_is_prepared(database_url: str) -> None:
    async with line(database_url, prepare=False) as made:
        for _ in range(3):
            assert await run(made.wire, "SELECT count(*) AS n FROM pg_prepared_statements") == [{"n": 0}]


async def test_a_large_answer_and_a_large_question_arrive_whole(wire: SharedConnection) -> None:
    text = "x" * 3_000_000
    answers = await asyncio.gather(*(run(wire, "SELECT $1::text AS t", text) for _ in range(5)))
    assert all(answer == [{"t": text}] for answer in answers)


async def test_closing_ends_what_is_under_way(database_url: str) -> None:
    async with line(database_url) as made:
        await run(made.wire, "SELECT 1")
        waiting = asyncio.ensure_future(run(made.wire, "SELECT pg_sleep(60)"))
        await sent()
        await made.wire.close()
        with pytest.raises(ConnectionLost):
            await waiting


@asynccontextmanager
async def opened_lanes(url: str, **options: Any) -> AsyncIterator[Lanes]:
    settings = {"readers": 2, "writers": 2, "prepare": True, "wait": 0.05, "deadline": 30} | options
    made = Lanes(Line(url).connect, **settings)
    try:
        yield made
    finally:
        await made.close()


async def test_readers_go_round_one_who_takes_long(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_STUCK", 0.0)
    async with opened_lanes(database_url) as made:
        await asyncio.gather(*(made.read(NOTHING, ("", ""), PID, ()) for _ in range(2)))
        slow = asyncio.ensure_future(made.read(NOTHING, ("", ""), "SELECT pg_sleep(60)", ()))
        await sent()
        for _ in range(20):
            await made.read(NOTHING, ("", ""), PID, ())
        assert not slow.done()
        slow.cancel()


async def test_writers_wait_for_a_connection_of_their_own_and_not_for_ever(database_url: str) -> None:
    async with opened_lanes(database_url) as made:
        slow = [asyncio.ensure_future(made.write(NOTHING, ("", ""), "SELECT pg_sleep(60)", ())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(PoolTimeout):
            await made.write(NOTHING, ("", ""), PID, ())
        assert await made.read(NOTHING, ("", ""), "SELECT 1 AS one", ()) == [{"one": 1}]
        for task in slow:
            task.cancel()


async def test_who_waits_to_write_gets_the_first_connection_that_is_free(database_url: str) -> None:
    """In the order in which they came; who is refused or has left in the meantime holds nobody up."""
    async with opened_lanes(database_url, writers=1, wait=30) as made:
        order: list[int] = []

        async def write(number: int, sql: str, *values: object) -> None:
            await made.write(NOTHING, ("", ""), sql, values)
            order.append(number)

        refused: tuple[str, object] = ("SELECT $1::text", object())  # psycopg cannot write it, so it is never sent
        said = [PID, PID, refused[0], PID, "SELECT 1 / 0", PID]
        values = [(), (), refused[1:], (), (), ()]
        tasks = [asyncio.ensure_future(write(n, sql, *values[n])) for n, sql in enumerate(said)]
        await asyncio.sleep(0)
        assert made.waiting == 5
        tasks[1].cancel()
        kinds = [type(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)]
        assert kinds[1:3] == [asyncio.CancelledError, psycopg.ProgrammingError]
        assert kinds[4] is psycopg.errors.DivisionByZero
        assert order == [0, 3, 5]
        assert made.waiting == made.in_use == 0
        await made.write(NOTHING, ("", ""), PID, ())


async def test_a_write_that_nobody_waits_for_keeps_its_connection_until_it_has_ended(database_url: str) -> None:
    """Else the next would have to wait behind whatever lock it waits for."""
    key = uuid4().int % 2**31
    async with (
        opened_lanes(database_url, wait=30) as made,
        await psycopg.AsyncConnection.connect(database_url) as other,
    ):
        await asyncio.gather(*(made.write(NOTHING, ("", ""), PID, ()) for _ in range(2)))
        await other.execute(f"SELECT pg_advisory_lock({key})")
        left = asyncio.ensure_future(made.write(NOTHING, ("", ""), f"SELECT pg_advisory_xact_lock({key})", ()))
        await sent()
        left.cancel()
        with suppress(asyncio.CancelledError):
            await left
        async with asyncio.timeout(20):
            for _ in range(4):
                await made.write(NOTHING, ("", ""), PID, ())
        assert made.in_use == 1


async def test_who_waits_to_write_is_not_forgotten_when_a_connection_is_lost(database_url: str) -> None:
    async with opened_lanes(database_url, writers=1, wait=30) as made:
        ends = "SELECT pg_terminate_backend(pg_backend_pid(), 5000)"
        statements = [ends, PID, ends, PID]
        tasks = [made.write(NOTHING, ("", ""), sql, ()) for sql in statements]
        kinds = [type(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)]
    assert kinds == [ConnectionLost, list, ConnectionLost, list]


async def test_who_waits_to_write_is_not_forgotten_when_there_is_no_connection_yet(database_url: str) -> None:
    """The first attempt to connect fails; whom the second was begun for has left by then."""
    line = Line(database_url)

    async def connect() -> Connection:
        if line.attempts == 0:
            line.attempts += 1
            raise psycopg.OperationalError("refused")
        return await line.connect()

    made = Lanes(connect, readers=1, writers=1, prepare=True, wait=30, deadline=30)
    tasks = [asyncio.ensure_future(made.write(NOTHING, ("", ""), PID, ())) for _ in range(3)]
    with suppress(psycopg.OperationalError):
        await tasks[0]
    tasks[1].cancel()
    async with asyncio.timeout(20):
        assert len(await tasks[2]) == 1
    await made.close()


@pytest.mark.parametrize("is_noticed", [False, True])
async def test_a_connection_that_ends_before_its_first_use_leaves_nobody_waiting(
    database_url: str, is_noticed: bool
) -> None:
    line = Line(database_url)

    async def connect() -> Connection:
        connection = await line.connect()
        if line.attempts == 1:
            async with await psycopg.AsyncConnection.connect(database_url) as other:
                await other.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
            if is_noticed:
                with suppress(psycopg.OperationalError):
                    await connection.execute("SELECT 1")
        return connection

    made = Lanes(connect, readers=1, writers=1, prepare=True, wait=30, deadline=30)
    writes = [made.write(NOTHING, ("", ""), PID, ()) for _ in range(3)]
    async with asyncio.timeout(20):
        kinds = [type(answer) for answer in await asyncio.gather(*writes, return_exceptions=True)]
    await made.close()
    assert issubclass(kinds[0], psycopg.OperationalError)
    assert kinds[1:] == [list, list]


async def test_closing_lets_nobody_wait_to_write(database_url: str) -> None:
    async with opened_lanes(database_url, writers=1, wait=30) as made:
        writes = [made.write(NOTHING, ("", ""), "SELECT pg_sleep(60)", ()) for _ in range(3)]
        tasks = [asyncio.ensure_future(write) for write in writes]
        await asyncio.sleep(0)
        await made.close()
        kinds = {type(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)}
    assert kinds <= {psycopg.OperationalError, ConnectionLost}


async def test_a_read_waits_in_the_queue_only_so_long(database_url: str) -> None:
    """What the server is working on has limits of its own."""
    async with opened_lanes(database_url, readers=1, wait=0.5) as made:
        await made.read(NOTHING, ("", ""), PID, ())
        slow = asyncio.ensure_future(made.read(NOTHING, ("", ""), "SELECT pg_sleep(60)", ()))
        await sent()
        with pytest.raises(PoolTimeout):
            async with asyncio.timeout(20):
                await made.read(NOTHING, ("", ""), PID, ())
        assert not slow.done()
        slow.cancel()


class Held:
    """A lock that another session has."""

    def __init__(self, other: psycopg.AsyncConnection, key: int) -> None:
        self._other = other
        self._key = key
        self.wait = f"SELECT pg_advisory_xact_lock({key})"

    async def free(self) -> None:
        await self._other.execute(f"SELECT pg_advisory_unlock({self._key})".encode())


@pytest.fixture
async def held(database_url: str) -> AsyncIterator[Held]:
    key = uuid4().int % 2**31
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute(f"SELECT pg_advisory_lock({key})".encode())
        yield Held(other, key)


async def test_who_waits_for_a_lock_never_takes_the_last_connection_for_long(database_url: str, held: Held) -> None:
    async with opened_lanes(database_url, wait=30) as made:

        def write(sql: str) -> asyncio.Task[list[dict[str, Any]]]:
            return asyncio.create_task(made.write(AS_LONG_AS_IT_MAY, ("", ""), sql, ()))

        blocked = [write(held.wait) for _ in range(5)]
        async with asyncio.timeout(20):
            assert len(await write(PID)) == 1
        assert not any(task.done() for task in blocked)
        await held.free()
        async with asyncio.timeout(20):
            await asyncio.gather(*blocked)
        assert made.waiting == made.in_use == 0


async def test_who_comes_when_another_is_to_be_refused_waits_as_well(database_url: str) -> None:
    """uvloop does not tell when a handle is due that was due when it was made."""
    async with wires(database_url, writers=1, wait=0.3) as made:
        loop = asyncio.get_running_loop()
        slow = asyncio.create_task(made.write(NOTHING, ("", ""), "SELECT pg_sleep(0.2)", ()))
        await asyncio.sleep(0)
        late = made.write(NOTHING, ("", ""), PID, (), begun=loop.time() - 1)
        other = made.write(NOTHING, ("", ""), "SELECT 1 AS one", ())
        kinds = await asyncio.gather(late, other, return_exceptions=True)
        assert (type(kinds[0]), kinds[1]) == (PoolTimeout, [{"one": 1}])
        await slow


async def test_one_person_who_waits_for_locks_leaves_a_connection_for_the_writes_of_others(
    database_url: str, held: Held
) -> None:
    async with wires(database_url, writers=3, wait=30) as made:
        blocked = [asyncio.create_task(made.write(AS_LONG_AS_IT_MAY, ("", "a"), held.wait, ())) for _ in range(200)]
        await asyncio.sleep(0)
        async with asyncio.timeout(2):  # 200 attempts of 50 ms each would take longer
            assert len(await made.write(AS_LONG_AS_IT_MAY, ("", "b"), PID, ())) == 1
            everybody = [made.write(AS_LONG_AS_IT_MAY, ("", ""), PID, ()) for _ in range(500)]
            await asyncio.gather(*everybody)
        assert not any(task.done() for task in blocked)
        await held.free()
        await asyncio.gather(*blocked)


async def test_the_time_in_the_queue_and_the_time_for_a_lock_are_one(database_url: str, held: Held) -> None:
    loop = asyncio.get_running_loop()
    async with opened_lanes(database_url, wait=1) as made:
        begun = loop.time()
        writes = (made.write(AS_LONG_AS_IT_MAY, ("", ""), held.wait, ()) for _ in range(9))
        answers = await asyncio.gather(*writes, return_exceptions=True)
        assert loop.time() - begun < 1.9  # twice that long, were they two
    assert {type(answer) for answer in answers} == {psycopg.errors.LockNotAvailable, PoolTimeout}


async def test_a_read_that_meets_a_lock_waits_among_the_writes(database_url: str) -> None:
    table = f"t_{uuid4().hex}"
    ask = f"SELECT count(*) AS n FROM {table}"  # noqa: S608
    async with (
        opened_lanes(database_url, readers=1, wait=30) as made,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other,
    ):

        def read(sql: str) -> asyncio.Task[list[dict[str, Any]]]:
            return asyncio.create_task(made.read(BRIEFLY, ("", "50ms"), sql, (), alone=AS_LONG_AS_IT_MAY))

        await other.execute(f"CREATE TABLE {table} (n int)".encode())
        async with other.transaction():
            await other.execute(f"LOCK TABLE {table}".encode())
            blocked = [read(ask) for _ in range(5)]
            async with asyncio.timeout(20):
                assert len(await read(PID)) == 1
                assert len(await made.write(AS_LONG_AS_IT_MAY, ("", ""), PID, ())) == 1
            assert not any(task.done() for task in blocked)
        async with asyncio.timeout(20):
            assert await asyncio.gather(*blocked) == [[{"n": 0}]] * 5
            assert await read(ask) == [{"n": 0}]
        assert made._locked == {}
        await other.execute(f"DROP TABLE {table}".encode())


async def test_persons_take_turns_with_what_takes_long(database_url: str) -> None:
    """However much one of them asks for, and two at once at most, while one connection is left for another person."""
    async with opened_lanes(database_url, searchers=3, wait=30) as made:
        order: list[str] = []

        async def search(person: str) -> None:
            await made.search(NOTHING, ("", person), "SELECT pg_sleep(0.2)", ())
            order.append(person)

        tasks = [asyncio.create_task(search("a")) for _ in range(8)]
        await asyncio.sleep(0)
        assert (made.searching.in_use, made.searching.waiting) == (2, 6)
        tasks += [asyncio.create_task(search(person)) for person in ("b", "c")]
        await asyncio.sleep(0)
        assert (made.searching.in_use, made.searching.waiting) == (3, 7)
        await asyncio.gather(*tasks)
        assert max(order.index("b"), order.index("c")) < 7
        assert not made.searching._running
        assert not made.searching._queues


async def test_a_person_with_a_full_queue_is_refused_alone(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING_PER_USER", 2)
    async with opened_lanes(database_url, searchers=1, wait=30) as made:
        searches = [made.search(NOTHING, ("", person), PID, ()) for person in "aaaab"]
        kinds = [type(answer) for answer in await asyncio.gather(*searches, return_exceptions=True)]
    assert kinds == [list, list, list, PoolTimeout, list]


async def test_who_waits_to_search_is_refused_in_time(database_url: str) -> None:
    async with opened_lanes(database_url, searchers=1, wait=0.3) as made:
        searches = [made.search(NOTHING, ("", "a"), "SELECT pg_sleep(1)", ()) for _ in range(3)]
        kinds = [type(answer) for answer in await asyncio.gather(*searches, return_exceptions=True)]
        assert kinds == [list, PoolTimeout, PoolTimeout]
        assert await made.search(NOTHING, ("", "a"), "SELECT 1 AS one", ()) == [{"one": 1}]


async def test_too_many_readers_are_refused_at_once(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING", 2)
    async with opened_lanes(database_url, readers=1) as made:
        reads = (made.read(NOTHING, ("", ""), "SELECT 1 AS one", ()) for _ in range(3))
        answers = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, list, PoolTimeout]


async def test_a_read_is_asked_again_where_the_connection_was_lost_and_a_write_is_not(database_url: str) -> None:
    """The statement ends its own session the first time that it runs."""
    async with opened_lanes(database_url) as made:
        for run, answer in (made.write, None), (made.read, [{"done": True}]), (made.search, [{"done": True}]):
            sequence = f"s_{uuid4().hex}"
            await made.write(NOTHING, ("", ""), f"CREATE SEQUENCE {sequence}", ())
            once = f"SELECT nextval('{sequence}') > 1 OR NOT pg_terminate_backend(pg_backend_pid(), 5000) AS done"
            if answer is None:
                with pytest.raises(ConnectionLost):
                    await run(NOTHING, ("", ""), once, ())
            else:
                assert await run(NOTHING, ("", ""), once, ()) == answer
