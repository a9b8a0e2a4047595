"""Lanes: queues, time limits, locks, and turns between users."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg_pool import PoolTimeout

from backend.database import Connection, lanes, pipeline
from backend.database.lanes import Lanes
from backend.database.query import ConnectionLost
from tests.database.test_pipeline import BRIEFLY, NOTHING, PID, Connector, sent

WITH_LOCK_TIMEOUT = "SELECT $1, $2, set_config('lock_timeout', $3, true)"


@asynccontextmanager
async def opened_lanes(url: str, **options: Any) -> AsyncIterator[Lanes]:
    settings = {"readers": 2, "writers": 2, "prepare": True, "wait": 0.05, "deadline": 30} | options
    made = Lanes(Connector(url).connect, **settings)
    try:
        yield made
    finally:
        await made.close()


async def test_reads_avoid_a_connection_with_a_long_read(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_STUCK", 0.0)
    async with opened_lanes(database_url) as made:
        await asyncio.gather(*(made.read(NOTHING, ("", ""), PID, ()) for _ in range(2)))
        slow = asyncio.ensure_future(made.read(NOTHING, ("", ""), "SELECT pg_sleep(60)", ()))
        await sent()
        for _ in range(20):
            await made.read(NOTHING, ("", ""), PID, ())
        assert not slow.done()
        slow.cancel()


async def test_a_write_waits_for_a_free_connection_in_bounded_time(database_url: str) -> None:
    async with opened_lanes(database_url) as made:
        slow = [asyncio.ensure_future(made.write(NOTHING, ("", ""), "SELECT pg_sleep(60)", ())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(PoolTimeout):
            await made.write(NOTHING, ("", ""), PID, ())
        assert await made.read(NOTHING, ("", ""), "SELECT 1 AS one", ()) == [{"one": 1}]
        for task in slow:
            task.cancel()


async def test_queued_writes_run_in_order(database_url: str) -> None:
    """Failed and cancelled writes do not delay the others."""
    async with opened_lanes(database_url, writers=1, wait=30) as made:
        order: list[int] = []

        async def write(number: int, sql: str, *values: object) -> None:
            await made.write(NOTHING, ("", ""), sql, values)
            order.append(number)

        unencodable: tuple[str, object] = ("SELECT $1::text", object())  # psycopg cannot encode it, so it is never sent
        statements = [PID, PID, unencodable[0], PID, "SELECT 1 / 0", PID]
        values = [(), (), unencodable[1:], (), (), ()]
        tasks = [asyncio.ensure_future(write(n, sql, *values[n])) for n, sql in enumerate(statements)]
        await asyncio.sleep(0)
        assert made.waiting == 5
        tasks[1].cancel()
        kinds = [type(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)]
        assert kinds[1:3] == [asyncio.CancelledError, psycopg.ProgrammingError]
        assert kinds[4] is psycopg.errors.DivisionByZero
        assert order == [0, 3, 5]
        assert made.waiting == made.in_use == 0
        await made.write(NOTHING, ("", ""), PID, ())


async def test_a_cancelled_write_keeps_its_connection_until_it_has_ended(database_url: str) -> None:
    """Otherwise the next write would wait behind the lock that this one waits for."""
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


async def test_queued_writes_survive_a_lost_connection(database_url: str) -> None:
    async with opened_lanes(database_url, writers=1, wait=30) as made:
        ends = "SELECT pg_terminate_backend(pg_backend_pid(), 5000)"
        statements = [ends, PID, ends, PID]
        tasks = [made.write(NOTHING, ("", ""), sql, ()) for sql in statements]
        kinds = [type(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)]
    assert kinds == [ConnectionLost, list, ConnectionLost, list]


async def test_queued_writes_survive_a_failed_attempt_to_connect(database_url: str) -> None:
    """The first attempt to connect fails; the query that started the second is cancelled before it succeeds."""
    connector = Connector(database_url)

    async def connect() -> Connection:
        if connector.attempts == 0:
            connector.attempts += 1
            raise psycopg.OperationalError("refused")
        return await connector.connect()

    made = Lanes(connect, readers=1, writers=1, prepare=True, wait=30, deadline=30)
    tasks = [asyncio.ensure_future(made.write(NOTHING, ("", ""), PID, ())) for _ in range(3)]
    with suppress(psycopg.OperationalError):
        await tasks[0]
    tasks[1].cancel()
    async with asyncio.timeout(20):
        assert len(await tasks[2]) == 1
    await made.close()


@pytest.mark.parametrize("is_noticed", [False, True])
async def test_a_connection_that_ends_before_its_first_use_fails_one_write(database_url: str, is_noticed: bool) -> None:
    connector = Connector(database_url)

    async def connect() -> Connection:
        connection = await connector.connect()
        if connector.attempts == 1:
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


async def test_closing_fails_queued_writes(database_url: str) -> None:
    async with opened_lanes(database_url, writers=1, wait=30) as made:
        writes = [made.write(NOTHING, ("", ""), "SELECT pg_sleep(60)", ()) for _ in range(3)]
        tasks = [asyncio.ensure_future(write) for write in writes]
        await asyncio.sleep(0)
        await made.close()
        kinds = {type(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)}
    assert kinds <= {psycopg.OperationalError, ConnectionLost}


async def test_a_read_is_queued_for_a_bounded_time(database_url: str) -> None:
    """The statement that the server is working on has limits of its own."""
    async with opened_lanes(database_url, readers=1, wait=0.5) as made:
        await made.read(NOTHING, ("", ""), PID, ())
        slow = asyncio.ensure_future(made.read(NOTHING, ("", ""), "SELECT pg_sleep(60)", ()))
        await sent()
        with pytest.raises(PoolTimeout):
            async with asyncio.timeout(20):
                await made.read(NOTHING, ("", ""), PID, ())
        assert not slow.done()
        slow.cancel()


class HeldLock:
    """An advisory lock held by another session."""

    def __init__(self, other: psycopg.AsyncConnection, key: int) -> None:
        self._other = other
        self._key = key
        self.wait = f"SELECT pg_advisory_xact_lock({key})"

    async def release(self) -> None:
        await self._other.execute(f"SELECT pg_advisory_unlock({self._key})".encode())


@pytest.fixture
async def held(database_url: str) -> AsyncIterator[HeldLock]:
    key = uuid4().int % 2**31
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute(f"SELECT pg_advisory_lock({key})".encode())
        yield HeldLock(other, key)


async def test_statements_that_wait_for_a_lock_leave_the_last_connection_free(
    database_url: str, held: HeldLock
) -> None:
    async with opened_lanes(database_url, wait=30) as made:

        def write(sql: str) -> asyncio.Task[list[dict[str, Any]]]:
            return asyncio.create_task(made.write(WITH_LOCK_TIMEOUT, ("", ""), sql, ()))

        blocked = [write(held.wait) for _ in range(5)]
        async with asyncio.timeout(20):
            assert len(await write(PID)) == 1
        assert not any(task.done() for task in blocked)
        await held.release()
        async with asyncio.timeout(20):
            await asyncio.gather(*blocked)
        assert made.waiting == made.in_use == 0


async def test_the_queue_and_the_lock_share_one_time_limit(database_url: str, held: HeldLock) -> None:
    loop = asyncio.get_running_loop()
    async with opened_lanes(database_url, wait=1) as made:
        begun = loop.time()
        writes = (made.write(WITH_LOCK_TIMEOUT, ("", ""), held.wait, ()) for _ in range(9))
        answers = await asyncio.gather(*writes, return_exceptions=True)
        assert loop.time() - begun < 1.9  # two limits would take twice as long
    assert {type(answer) for answer in answers} == {psycopg.errors.LockNotAvailable, PoolTimeout}


async def test_a_read_that_meets_a_lock_moves_to_the_lane_for_writes(database_url: str) -> None:
    table = f"t_{uuid4().hex}"
    ask = f"SELECT count(*) AS n FROM {table}"  # noqa: S608  # a generated name
    async with (
        opened_lanes(database_url, readers=1, wait=30) as made,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other,
    ):

        def read(sql: str) -> asyncio.Task[list[dict[str, Any]]]:
            return asyncio.create_task(made.read(BRIEFLY, ("", "50ms"), sql, (), alone=WITH_LOCK_TIMEOUT))

        await other.execute(f"CREATE TABLE {table} (n int)".encode())
        async with other.transaction():
            await other.execute(f"LOCK TABLE {table}".encode())
            blocked = [read(ask) for _ in range(5)]
            async with asyncio.timeout(20):
                assert len(await read(PID)) == 1
                assert len(await made.write(WITH_LOCK_TIMEOUT, ("", ""), PID, ())) == 1
            assert not any(task.done() for task in blocked)
        async with asyncio.timeout(20):
            assert await asyncio.gather(*blocked) == [[{"n": 0}]] * 5
            assert await read(ask) == [{"n": 0}]
        assert made._locked == {}
        await other.execute(f"DROP TABLE {table}".encode())


async def test_users_take_turns_with_long_reads(database_url: str) -> None:
    """One user runs at most two at once, however many are queued, so that one connection is left for other users."""
    async with opened_lanes(database_url, searchers=3, wait=30) as made:
        order: list[str] = []

        async def search(user: str) -> None:
            await made.search(NOTHING, ("", user), "SELECT pg_sleep(0.2)", ())
            order.append(user)

        tasks = [asyncio.create_task(search("a")) for _ in range(8)]
        await asyncio.sleep(0)
        assert (made.searching.in_use, made.searching.waiting) == (2, 6)
        tasks += [asyncio.create_task(search(user)) for user in ("b", "c")]
        await asyncio.sleep(0)
        assert (made.searching.in_use, made.searching.waiting) == (3, 7)
        await asyncio.gather(*tasks)
        assert max(order.index("b"), order.index("c")) < 7
        assert not made.searching._running
        assert not made.searching._queues


async def test_a_full_queue_refuses_only_its_user(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING_PER_USER", 2)
    async with opened_lanes(database_url, searchers=1, wait=30) as made:
        searches = [made.search(NOTHING, ("", user), PID, ()) for user in "aaaab"]
        kinds = [type(answer) for answer in await asyncio.gather(*searches, return_exceptions=True)]
    assert kinds == [list, list, list, PoolTimeout, list]


async def test_a_queued_search_is_refused_in_time(database_url: str) -> None:
    async with opened_lanes(database_url, searchers=1, wait=0.3) as made:
        searches = [made.search(NOTHING, ("", "a"), "SELECT pg_sleep(1)", ()) for _ in range(3)]
        kinds = [type(answer) for answer in await asyncio.gather(*searches, return_exceptions=True)]
        assert kinds == [list, PoolTimeout, PoolTimeout]
        assert await made.search(NOTHING, ("", "a"), "SELECT 1 AS one", ()) == [{"one": 1}]


async def test_too_many_reads_are_refused_at_once(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING", 2)
    async with opened_lanes(database_url, readers=1) as made:
        reads = (made.read(NOTHING, ("", ""), "SELECT 1 AS one", ()) for _ in range(3))
        answers = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, list, PoolTimeout]


async def test_a_read_is_sent_again_after_a_lost_connection_and_a_write_is_not(database_url: str) -> None:
    """The statement ends its own session the first time that it runs."""
    async with opened_lanes(database_url, wait=30) as made:
        for run, answer in (made.write, None), (made.read, [{"done": True}]), (made.search, [{"done": True}]):
            sequence = f"s_{uuid4().hex}"
            await made.write(NOTHING, ("", ""), f"CREATE SEQUENCE {sequence}", ())
            once = f"SELECT nextval('{sequence}') > 1 OR NOT pg_terminate_backend(pg_backend_pid(), 5000) AS done"
            if answer is None:
                with pytest.raises(ConnectionLost):
                    await run(NOTHING, ("", ""), once, ())
            else:
                assert await run(NOTHING, ("", ""), once, ()) == answer


async def test_a_write_is_queued_while_another_is_being_refused(database_url: str) -> None:
    """uvloop's handle of a time that is already due has no `when()`."""
    async with opened_lanes(database_url, writers=1, wait=0.3) as made:
        loop = asyncio.get_running_loop()
        slow = asyncio.create_task(made.write(NOTHING, ("", ""), "SELECT pg_sleep(0.2)", ()))
        await asyncio.sleep(0)
        late = made.write(NOTHING, ("", ""), PID, (), begun=loop.time() - 1)
        other = made.write(NOTHING, ("", ""), "SELECT 1 AS one", ())
        kinds = await asyncio.gather(late, other, return_exceptions=True)
        assert (type(kinds[0]), kinds[1]) == (PoolTimeout, [{"one": 1}])
        await slow


async def test_a_user_that_waits_for_locks_leaves_a_connection_to_other_users(
    database_url: str, held: HeldLock
) -> None:
    async with opened_lanes(database_url, writers=3, wait=30) as made:
        blocked = [asyncio.create_task(made.write(WITH_LOCK_TIMEOUT, ("", "a"), held.wait, ())) for _ in range(200)]
        await asyncio.sleep(0)
        async with asyncio.timeout(2):  # 200 attempts of 50 ms each would take longer
            assert len(await made.write(WITH_LOCK_TIMEOUT, ("", "b"), PID, ())) == 1
            others = [made.write(WITH_LOCK_TIMEOUT, ("", ""), PID, ()) for _ in range(500)]
            await asyncio.gather(*others)
        assert not any(task.done() for task in blocked)
        await held.release()
        await asyncio.gather(*blocked)
