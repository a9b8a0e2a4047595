"""Shared connections: queries do not affect each other, and a lost connection is opened again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from backend.database import Connection, UnreadableRow, connection, pipeline, prepared
from backend.database.connection import SharedConnection
from backend.database.pipeline import Pipeline
from backend.database.prepared import PreparedStatements
from backend.database.query import ConnectionLost, Query
from tests.support.relay import Relay

NOTHING = "SELECT $1, $2"
BRIEFLY = "SELECT $1, set_config('lock_timeout', $2, true)"
PID = "SELECT pg_backend_pid() AS pid"


async def run(shared: SharedConnection, sql: str, *values: object) -> list[dict[str, Any]]:
    return await shared.run(Query(NOTHING, ("", ""), sql, values))


def prepared_on(shared: SharedConnection) -> list[str]:
    assert shared._pipeline is not None
    return [sql for sql, _ in shared._pipeline._statements._statements]


class Connector:
    """A shared connection to `url` that counts its attempts to connect."""

    def __init__(self, url: str, *, prepare: bool = True, deadline: float = 30, reads: bool = False) -> None:
        self.url = url
        self.attempts = 0
        self.shared = SharedConnection(self.connect, prepare=prepare, deadline=deadline, reads=reads)

    async def connect(self) -> Connection:
        self.attempts += 1
        return await psycopg.AsyncConnection.connect(
            self.url, autocommit=True, row_factory=dict_row, application_name="transport", connect_timeout=5
        )


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Connector]:
    connector = Connector(url, **options)
    try:
        yield connector
    finally:
        await connector.shared.close()


async def sent() -> None:
    """Let the queries that were just queued be sent."""
    for _ in range(2):
        await asyncio.sleep(0)


@pytest.fixture(params=[False, True], ids=["any", "reads"])
async def shared(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[SharedConnection]:
    async with opened(database_url, reads=request.param) as connector:
        yield connector.shared


@pytest.fixture
async def writer(database_url: str) -> AsyncIterator[SharedConnection]:
    async with opened(database_url) as connector:
        yield connector.shared


@pytest.fixture
async def reader(database_url: str) -> AsyncIterator[SharedConnection]:
    async with opened(database_url, reads=True) as connector:
        yield connector.shared


async def test_concurrent_queries_get_their_own_rows(shared: SharedConnection) -> None:
    answers = await asyncio.gather(*(run(shared, "SELECT $1::int AS n", n) for n in range(300)))
    assert answers == [[{"n": n}] for n in range(300)]


async def test_column_names_may_be_any_text_and_the_last_duplicate_wins(shared: SharedConnection) -> None:
    names = ["one", "a'b", 'a"b', "a\\n", "a{b}%s", "tür\N{GRINNING FACE}", "one"]
    columns = ", ".join(f"""{n} AS "{name.replace('"', '""')}\"""" for n, name in enumerate(names))
    for _ in range(2):
        assert await run(shared, f"SELECT {columns}") == [dict(zip(names, range(len(names)), strict=True))]
    assert await run(shared, "SELECT FROM (VALUES (1), (2)) AS two") == []


async def test_an_error_fails_only_its_own_statement(shared: SharedConnection) -> None:
    """Also where the failing statement is being prepared, and the next query relies on that."""
    answers = await asyncio.gather(
        run(shared, "SELECT 1 AS one"),
        run(shared, "SELECT 1 / $1::int AS n", 0),
        run(shared, "SELECT 1 / $1::int AS n", 1),
        run(shared, "SELEC"),
        run(shared, "SELEC"),
        shared.run(Query("SELECT set_config('role', $1, true), $2", ("unknown_role", ""), "SELECT 2 AS two", ())),
        run(shared, "SELECT 1 AS one"),
        return_exceptions=True,
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [
        list,
        psycopg.errors.DivisionByZero,
        list,
        psycopg.errors.SyntaxError,
        psycopg.errors.InvalidSqlStatementName,  # the query before it failed to prepare it; a retry may succeed
        psycopg.errors.InvalidParameterValue,
        list,
    ]
    assert await run(shared, "SELECT 2 AS two") == [{"two": 2}]


async def test_reads_skipped_by_another_reads_error_are_sent_again(reader: SharedConnection) -> None:
    """Also where every second statement of a transaction fails."""
    answers = await asyncio.gather(
        *(run(reader, "SELECT 1 / $1::int AS n", n % 2) for n in range(40)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [psycopg.errors.DivisionByZero, list] * 20


async def test_reads_sent_together_share_a_transaction(reader: SharedConnection) -> None:
    moment = "SELECT now() AS at"
    together = await asyncio.gather(*(run(reader, moment) for _ in range(5)))
    later = await run(reader, moment)
    assert [answer == together[0] for answer in (*together, later)] == [True] * 5 + [False]


async def test_a_read_does_not_wait_for_those_behind_it(shared: SharedConnection) -> None:
    await run(shared, "SELECT 1 AS one")
    quick = asyncio.ensure_future(run(shared, "SELECT 1 AS one"))
    slow = asyncio.ensure_future(run(shared, "SELECT pg_sleep(60)"))
    assert await quick == [{"one": 1}]
    assert not slow.done()
    slow.cancel()


async def test_each_write_is_its_own_transaction(writer: SharedConnection) -> None:
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
    found = await run(writer, f"DELETE FROM {table} RETURNING n")  # noqa: S608  # a generated name
    assert sorted(row["n"] for row in found) == [1, 2, 4]
    await run(writer, f"DROP TABLE {table}")


class Unwritable:
    pass


@pytest.mark.parametrize(
    ("value", "error"),
    [("\0", psycopg.DataError), ("\ud800", psycopg.DataError), (Unwritable(), psycopg.ProgrammingError)],
)
async def test_a_value_that_cannot_be_encoded_fails_only_its_own_statement(
    shared: SharedConnection, value: object, error: type[Exception]
) -> None:
    """Whatever its dumper raises, the queries queued with it are sent."""
    ask = "SELECT $1::text AS t"
    await run(shared, "SELECT 1")
    answers = await asyncio.gather(
        run(shared, ask, "a"), run(shared, ask, value), run(shared, ask, "b"), return_exceptions=True
    )
    assert [answers[0], type(answers[1]), answers[2]] == [[{"t": "a"}], error, [{"t": "b"}]]
    assert await run(shared, ask, "c") == [{"t": "c"}]


async def test_an_error_in_encoding_or_decoding_fails_only_its_own_statement(
    shared: SharedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run(shared, "SELECT 1")

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    for step, error in (("bind", ZeroDivisionError), ("rows", UnreadableRow)):
        with monkeypatch.context() as broken:
            broken.setattr(PreparedStatements, step, fail)
            with pytest.raises(error):
                await asyncio.wait_for(run(shared, "SELECT 1"), 10)
    assert await run(shared, "SELECT 1 AS one") == [{"one": 1}]


async def test_skipped_reads_survive_a_lost_connection(
    reader: SharedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is lost while they are sent again: the first was sent and fails, the others were not and run later."""
    await run(reader, "SELECT 1")
    end, calls = Pipeline._end_transaction, iter(range(10))

    def end_or_fail(self: Pipeline) -> None:
        if next(calls) == 1:
            raise psycopg.OperationalError("as if the server had closed it")
        end(self)

    monkeypatch.setattr(Pipeline, "_end_transaction", end_or_fail)
    async with asyncio.timeout(20):
        answers = await asyncio.gather(
            run(reader, "SELECT 1 / 0"), *(run(reader, "SELECT 1 AS one") for _ in range(3)), return_exceptions=True
        )
    assert [type(answer) for answer in answers] == [psycopg.errors.DivisionByZero, ConnectionLost, list, list]


async def test_a_statement_that_could_not_be_prepared_is_forgotten(
    reader: SharedConnection,
) -> None:
    """A query that relied on it fails and may be retried; statements that were prepared before are kept."""
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
async def test_a_statement_that_met_a_lock_while_being_prepared_is_prepared_later(
    database_url: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same connection, also if other queries relied on it meanwhile."""
    monkeypatch.setattr(pipeline, "_LOCKED", 0.0)
    table = f"t_{uuid4().hex}"
    ask = f"SELECT count(*) AS n FROM {table}"  # noqa: S608  # a generated name
    async with (
        opened(database_url, reads=reads) as connector,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other,
    ):

        async def count() -> list[dict[str, Any]]:
            return await connector.shared.run(Query(BRIEFLY, ("", "200ms"), ask, ()))

        await other.execute(f"CREATE TABLE {table} (n int)".encode())
        (pid,) = await run(connector.shared, PID)
        async with other.transaction():
            await other.execute(f"LOCK TABLE {table}".encode())
            answers = await asyncio.gather(*(count() for _ in range(3)), return_exceptions=True)
            kinds = {type(answer) for answer in answers}
            assert psycopg.errors.LockNotAvailable in kinds
            assert kinds <= {psycopg.errors.LockNotAvailable, psycopg.errors.InvalidSqlStatementName}
            assert ask not in prepared_on(connector.shared)
        assert await count() == [{"n": 0}]
        assert await run(connector.shared, PID) == [pid]
        await other.execute(f"DROP TABLE {table}".encode())


async def test_a_read_that_met_a_lock_is_refused_for_a_while(reader: SharedConnection, database_url: str) -> None:
    """Queries with the same statement that were sent with it are refused, too, as each would delay the others."""
    table = f"t_{uuid4().hex}"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute(f"CREATE TABLE {table} (n int)".encode())
        await run(reader, PID)
        async with other.transaction():
            await other.execute(f"LOCK TABLE {table}".encode())
            ask = f"SELECT count(*) AS n FROM {table}"  # noqa: S608  # a generated name
            queries = [reader.run(Query(BRIEFLY, ("", "300ms"), ask, ())) for _ in range(30)]
            free = asyncio.ensure_future(run(reader, "SELECT 1 AS one"))
            async with asyncio.timeout(6):  # thirty times 0.3 s would be more
                assert await free == [{"one": 1}]
                answers = await asyncio.gather(*queries, return_exceptions=True)
        assert {type(answer) for answer in answers} == {psycopg.errors.LockNotAvailable}
        await other.execute(f"DROP TABLE {table}".encode())


async def test_no_queries_are_sent_behind_a_long_read(reader: SharedConnection) -> None:
    await run(reader, PID)
    slow = asyncio.ensure_future(run(reader, "SELECT pg_sleep(1)"))
    async with asyncio.timeout(20):
        while not reader.is_stuck():  # noqa: ASYNC110  # no event marks the passing of time
            await asyncio.sleep(0.01)
    behind = [asyncio.ensure_future(run(reader, "SELECT $1::int AS n", n)) for n in range(3)]
    await sent()
    assert (len(reader._unsent), reader.waiting) == (3, 3)
    assert await asyncio.gather(*behind) == [[{"n": n}] for n in range(3)]
    assert slow.done()
    assert reader.waiting == 0


@pytest.mark.parametrize("reads", [False, True])
async def test_a_connection_that_responds_is_kept(database_url: str, reads: bool) -> None:
    """Each response restarts the deadline, however long the queue is."""
    async with opened(database_url, reads=reads, deadline=1.5) as connector:
        (pid,) = await run(connector.shared, PID)
        answers = await asyncio.gather(*(run(connector.shared, "SELECT pg_sleep(0.5)") for _ in range(5)))
        assert len(answers) == 5
        assert await run(connector.shared, PID) == [pid]


async def test_a_cancelled_job_does_not_affect_others(shared: SharedConnection) -> None:
    pid = (await run(shared, PID))[0]["pid"]
    slow = asyncio.ensure_future(run(shared, "SELECT pg_sleep(0.2)"))
    behind = asyncio.ensure_future(run(shared, "SELECT 'behind' AS text"))
    cancelled = asyncio.ensure_future(run(shared, "SELECT 'cancelled' AS text"))
    await sent()
    slow.cancel()
    cancelled.cancel()
    assert await behind == [{"text": "behind"}]
    with suppress(asyncio.CancelledError):
        await cancelled
    assert await run(shared, PID) == [{"pid": pid}]
    assert len(shared) <= int(shared._reads)  # at most the end of a transaction


async def test_a_job_cancelled_before_it_is_sent_is_not_run(database_url: str) -> None:
    """It was cancelled while the connection was being opened."""
    async with opened(database_url) as connector:
        table = f"t_{uuid4().hex}"
        creation = asyncio.ensure_future(run(connector.shared, f"CREATE TABLE {table} (n int)"))
        await asyncio.sleep(0)
        creation.cancel()
        assert await run(connector.shared, "SELECT to_regclass($1) IS NULL AS absent", table) == [{"absent": True}]


async def test_a_lost_connection_fails_the_sent_queries_and_is_opened_again(database_url: str) -> None:
    """At once, also if the server had unread queries: then its last message and a socket error arrive together."""
    is_sleeping = "SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'active' AND query ~ 'pg_sleep'"
    async with opened(database_url) as connector:
        (row,) = await run(connector.shared, PID)
        queries = [asyncio.ensure_future(run(connector.shared, "SELECT pg_sleep(60)"))]
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
            while (await other.execute(is_sleeping, (row["pid"],))).rowcount == 0:
                pass
        queries += [asyncio.ensure_future(run(connector.shared, "SELECT 1")) for _ in range(2)]
        await sent()
        with psycopg.connect(database_url, autocommit=True) as other:  # blocks the event loop
            other.execute("SELECT pg_terminate_backend(%s, 5000)", (row["pid"],))
        async with asyncio.timeout(20):  # less than the deadline
            answers = await asyncio.gather(*queries, return_exceptions=True)
        assert [type(answer) for answer in answers] == [ConnectionLost] * 3
        assert (await run(connector.shared, PID))[0]["pid"] != row["pid"]
        assert connector.attempts == 2


async def test_a_connection_that_ended_while_idle_is_not_used(database_url: str) -> None:
    async with opened(database_url) as connector:
        (row,) = await run(connector.shared, PID)
        with psycopg.connect(database_url, autocommit=True) as other:  # blocks the event loop
            other.execute("SELECT pg_terminate_backend(%s, 5000)", (row["pid"],))
        assert (await run(connector.shared, PID))[0]["pid"] != row["pid"]


@pytest.mark.parametrize("reads", [False, True])
async def test_unsent_queries_wait_for_the_next_connection(database_url: str, reads: bool) -> None:
    async with opened(database_url, reads=reads) as connector:
        (before,) = await run(connector.shared, PID)
        waiting = [connector.shared.run(Query(NOTHING, ("", ""), PID, ())) for _ in range(3)]
        connector.shared._disconnect("as if the server had closed it")
        answers = await asyncio.gather(*waiting)
        assert before not in [row for rows in answers for row in rows]
        assert connector.attempts == 2


async def test_a_job_that_is_sent_again_has_the_full_deadline(database_url: str) -> None:
    async with opened(database_url, reads=True, deadline=1.7) as connector:
        (row,) = await run(connector.shared, PID)
        answers = await asyncio.gather(
            run(connector.shared, "SELECT 1 / (SELECT 0 FROM pg_sleep(1))"),
            run(connector.shared, "SELECT pg_sleep(1)"),
            return_exceptions=True,
        )
        assert [type(answer) for answer in answers] == [psycopg.errors.DivisionByZero, list]
        assert await run(connector.shared, PID) == [row]


async def test_a_connection_to_a_hanging_server_is_closed(database_url: str) -> None:
    async with Relay(database_url) as relay, opened(relay.url, deadline=0.1) as connector:
        assert await run(connector.shared, "SELECT 1 AS one") == [{"one": 1}]
        relay.hang()
        answers = await asyncio.gather(
            run(connector.shared, "SELECT 1"), run(connector.shared, "SELECT 2"), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [ConnectionLost] * 2
        assert await run(connector.shared, "SELECT 1 AS one") == [{"one": 1}]


async def test_a_server_that_is_down_fails_queries_at_once_and_is_tried_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_PAUSE", 0.01)
    async with opened("postgresql://nobody@127.0.0.1:9/nothing") as connector:
        for _ in range(3):
            answers = await asyncio.gather(
                *(run(connector.shared, "SELECT 1") for _ in range(5)), return_exceptions=True
            )
            assert {type(answer) for answer in answers} == {psycopg.OperationalError}
        assert connector.attempts == 3
        connector.url = database_url
        assert await run(connector.shared, "SELECT 1 AS one") == [{"one": 1}]


async def test_statements_are_prepared_once_up_to_a_limit(
    shared: SharedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = "SELECT count(*) AS n FROM pg_prepared_statements"
    for _ in range(3):
        await run(shared, "SELECT $1::int / $2::int", 1, 1)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await run(shared, "SELECT $1::int / $2::int", 1, 0)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await run(shared, "SELECT 2 / 0")
    assert await run(shared, count) == [{"n": 4}]
    monkeypatch.setattr(prepared, "MAX_PREPARED", 4)
    assert await run(shared, "SELECT 'one more' AS t") == [{"t": "one more"}]
    assert await run(shared, count) == [{"n": 4}]


async def test_large_values_and_results_arrive_complete(shared: SharedConnection) -> None:
    text = "x" * 3_000_000
    answers = await asyncio.gather(*(run(shared, "SELECT $1::text AS t", text) for _ in range(5)))
    assert all(answer == [{"t": text}] for answer in answers)


async def test_closing_fails_the_sent_queries(database_url: str) -> None:
    async with opened(database_url) as connector:
        await run(connector.shared, "SELECT 1")
        waiting = asyncio.ensure_future(run(connector.shared, "SELECT pg_sleep(60)"))
        await sent()
        await connector.shared.close()
        with pytest.raises(ConnectionLost):
            await waiting
