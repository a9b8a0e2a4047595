"""The executor: roles, transactions, errors, and connections without leftover settings."""

import asyncio
import re
from contextlib import AsyncExitStack
from importlib import import_module
from pkgutil import walk_packages
from typing import LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg_pool import PoolTimeout
from sqlalchemy import Integer, cast, column, func, literal_column, select, table, text

import backend
from backend import migrations
from backend.database import NOTICE_DEAD_CLIENT, SYSTEM, Actor, Cost, Database, Pool, Row, Statement, Transaction
from backend.database.query import Query
from tests.conftest import create_database


def raw(sql: str) -> Statement:
    """A statement from SQL text. `:name` is a parameter."""
    return Statement(text(sql))


async def connection_id(database: Database) -> int:
    row = await database.row(raw("SELECT pg_backend_pid() AS pid"))
    assert row
    pid: int = row["pid"]
    return pid


@pytest.fixture
async def pool(database_url: str) -> Pool:
    return Pool(database_url, size=5)


async def test_a_statement_runs_as_its_actor_and_leaves_nothing_behind(pool: Pool) -> None:
    settings = raw(
        "SELECT current_user AS role, current_setting('app.caller') AS caller, current_setting('timezone') AS zone"
    )
    user = Actor.user(uuid4())
    leftovers: LiteralString = (
        "SELECT current_user = session_user AS self, nullif(current_setting('app.caller', true), '') AS c"
    )
    async with pool:
        for actor in user, SYSTEM, user:
            assert await Database(pool, actor).row(settings) == {"role": actor.role, "caller": actor.id, "zone": "UTC"}
            assert await Database(pool, actor).transact(lambda transaction: transaction.row(settings))
            async with pool.connection() as connection:
                row = await (await connection.execute(leftovers)).fetchone()
            assert row == {"self": True, "c": None}
            for shared in (*pool.lanes.readers, *pool.lanes.writing.connections, *pool.lanes.searching.connections):
                # Without a role, so that settings left behind by the last transaction would show.
                (found,) = await shared.run(Query("SELECT $1, $2", ("", ""), leftovers, ()))
                assert found == {"self": True, "c": None}


async def test_reads_sent_together_do_not_inherit_each_others_settings(database_url: str) -> None:
    settings_in_use = select(
        literal_column("current_user").label("role"),
        func.current_setting("app.caller").label("caller"),
        (func.current_setting("plan_cache_mode") == "force_generic_plan").label("keeps_plan"),
        func.now().label("moment"),
    )
    actors = [Actor.user(uuid4()), SYSTEM, Actor.user(uuid4()), SYSTEM] * 5
    statements = [Statement(settings_in_use), Statement(settings_in_use, keeps_plan=True), Statement(settings_in_use)]
    expected = [(actor, statement) for actor in actors for statement in statements]
    async with Pool(database_url, size=5) as pool:
        await Database(pool, SYSTEM).rows(statements[0])  # until it is connected, each statement is sent separately
        found = await asyncio.gather(*(Database(pool, actor).row(statement) for actor, statement in expected))
    rows = [row for row in found if row is not None]
    assert len({row.pop("moment") for row in rows}) < len(rows)
    assert rows == [
        {"role": actor.role, "caller": actor.id, "keeps_plan": statement is statements[1]}
        for actor, statement in expected
    ]


def test_statements_with_side_effects_are_marked_as_writes() -> None:
    """All statements in the modules of the backend, including those that only run in transactions."""
    names = [
        name for _, name, _ in walk_packages(backend.__path__, "backend.") if not name.startswith("backend.migrations.")
    ]
    statements = [
        (f"{module}.{name}", value)
        for module in names
        for name, value in vars(import_module(module)).items()
        if isinstance(value, Statement)
    ]
    effects = re.compile(r"pg_notify|nextval|set_config|pg_advisory|FOR (NO KEY )?UPDATE|FOR (KEY )?SHARE")
    acting = [(name, statement.writes) for name, statement in statements if effects.search(statement.sql)]
    assert len(statements) > 20
    assert acting
    assert [name for name, writes in acting if not writes] == []


async def test_a_connection_is_usable_after_an_error(pool: Pool) -> None:
    async with pool:
        database = Database(pool, SYSTEM)
        pid = await connection_id(database)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await database.rows(raw("SELECT 1 / 0"))
        assert await connection_id(database) == pid


async def test_a_commit_that_fails_is_an_error(pool: Pool) -> None:
    """Deferred constraints are forbidden (a test reads the catalogue), but one would not cause a false success."""
    async with pool:
        async with pool.connection() as connection:
            await connection.execute("CREATE TABLE late (i int CONSTRAINT u UNIQUE DEFERRABLE INITIALLY DEFERRED)")
            await connection.execute("GRANT ALL ON late TO api_system")
        database = Database(pool, SYSTEM)
        insert = raw("INSERT INTO late VALUES (1), (1)")
        try:
            with pytest.raises(psycopg.errors.UniqueViolation):
                await database.rows(insert)
            with pytest.raises(psycopg.errors.UniqueViolation):
                await database.transact(lambda transaction: transaction.rows(insert))
            assert await database.rows(raw("SELECT * FROM late")) == []
        finally:
            async with pool.connection() as connection:
                await connection.execute("DROP TABLE late")


async def test_a_transaction_is_all_or_nothing(pool: Pool) -> None:
    insert = raw("INSERT INTO users (issuer, subject) VALUES ('atomic', :subject) RETURNING id")
    count = raw("SELECT count(*) AS n FROM users WHERE issuer = 'atomic'")

    async def fails(transaction: Transaction) -> None:
        await transaction.rows(insert, subject="a")
        assert await transaction.row(count) == {"n": 1}
        await transaction.rows(insert, subject="a")

    async with pool:
        database = Database(pool, SYSTEM)
        with pytest.raises(psycopg.errors.UniqueViolation):
            await database.transact(fails)
        assert await database.row(count) == {"n": 0}


async def test_a_deadlock_is_retried_once(database_url: str) -> None:
    async with Pool(database_url, size=8) as pool:
        database = Database(pool, SYSTEM)
        made = raw("INSERT INTO users (issuer, subject) VALUES ('lock', :subject) RETURNING id")
        touch = raw("UPDATE users SET locale = 'de' WHERE id = :id")
        ids = [(await database.rows(made, subject=uuid4().hex))[0]["id"] for _ in range(2)]
        both_hold_one = asyncio.Barrier(2)
        attempts: list[UUID] = []

        async def work(transaction: Transaction, first: UUID, second: UUID) -> None:
            attempts.append(first)
            await transaction.rows(touch, id=first)
            if attempts.count(first) == 1:
                await both_hold_one.wait()
            await transaction.rows(touch, id=second)

        await asyncio.gather(
            database.transact(lambda transaction: work(transaction, *ids)),
            database.transact(lambda transaction: work(transaction, *reversed(ids))),
        )
        assert len(attempts) == 3


async def test_a_second_conflict_is_raised(pool: Pool) -> None:
    calls = 0

    async def conflict(_: Transaction) -> Row:
        nonlocal calls
        calls += 1
        raise psycopg.errors.SerializationFailure

    async with pool:
        with pytest.raises(psycopg.errors.SerializationFailure):
            await Database(pool, SYSTEM).transact(conflict)
    assert calls == 2


async def test_an_exhausted_pool_is_an_error_in_bounded_time(database_url: str) -> None:
    async with Pool(database_url, size=5, wait=0.05) as pool, pool.connection():
        with pytest.raises(PoolTimeout):
            await Database(pool, SYSTEM).transact(lambda transaction: transaction.rows(raw("SELECT 1")))


async def test_statements_and_locks_have_time_limits(database_url: str) -> None:
    """The server ends a long statement and a long wait for a lock; the client closes a connection that hangs."""
    names = "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"
    settings = table("pg_settings", column("name"), column("setting"))
    value = select(cast(settings.c.setting, Integer))
    limits = select(*(value.where(settings.c.name == name).scalar_subquery().label(name) for name in names))
    read, write, search = Statement(limits), Statement(limits, writes=True), Statement(limits, cost=Cost.long)
    sleep = raw("SELECT pg_sleep(5)")

    def seconds(rows: list[Row]) -> list[float]:
        (row,) = rows
        return [value / 1000 for value in row.values()]

    def of(*expected: float) -> object:
        """The lock_timeout is reduced by the time that has already passed."""
        return pytest.approx(expected, abs=1)

    async with Pool(database_url, size=5, deadline=0.2) as pool:
        database = Database(pool, SYSTEM)
        assert seconds(await database.rows(read)) == [2, 0.05, 0]
        assert seconds(await database.rows(write)) == of(4, 3, 0)
        assert seconds(await database.rows(search)) == of(10, 3, 0)
        assert seconds(await database.transact(lambda transaction: transaction.rows(read))) == of(10, 3, 5)
        with pytest.raises(psycopg.OperationalError):
            await database.rows(sleep)
        with pytest.raises(psycopg.OperationalError):
            await database.transact(lambda transaction: transaction.rows(sleep))
        assert await database.row(raw("SELECT 1 AS one")) == {"one": 1}


async def test_times_are_utc_in_a_database_with_another_time_zone(postgres: str) -> None:
    url = create_database(postgres, f"berlin_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET timezone TO 'Europe/Berlin'".encode())
    async with Pool(url, size=5) as pool:
        row = await Database(pool, SYSTEM).row(
            raw("SELECT timestamptz '2026-07-01 12:00+00' AS at, now()::text AS now")
        )
    assert row is not None
    assert row["at"].isoformat() == "2026-07-01T12:00:00+00:00"
    assert row["now"].endswith("+00")


async def test_an_unreadable_stored_value_is_a_server_error(pool: Pool) -> None:
    async with pool:
        with pytest.raises(RuntimeError):
            await Database(pool, SYSTEM).rows(raw("SELECT 'infinity'::timestamptz AS at"))


async def test_a_statement_is_prepared_again_after_its_table_changed(pool: Pool) -> None:
    """As when a migration runs beside the server: the prepared statement is stale, and no request fails."""
    async with pool:
        database = Database(pool, SYSTEM)
        async with pool.connection() as connection:
            await connection.execute("CREATE TABLE moving (i int); INSERT INTO moving VALUES (1)")
            await connection.execute("GRANT SELECT ON moving TO api_system")
        select = raw("SELECT i FROM moving")
        try:
            assert await database.rows(select) == [{"i": 1}]
            async with pool.connection() as connection:
                await connection.execute("ALTER TABLE moving ALTER i TYPE text")
            assert await database.rows(select) == [{"i": "1"}]
        finally:
            async with pool.connection() as connection:
                await connection.execute("DROP TABLE moving")


@pytest.mark.parametrize(
    ("error", "attempts"),
    [("DeadlockDetected", 2), ("SerializationFailure", 2), ("UniqueViolation", 1), ("LockNotAvailable", 1)],
)
async def test_only_conflicts_are_retried(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, error: str, attempts: int
) -> None:
    tried = 0

    async def fails(*_: object) -> None:
        nonlocal tried
        tried += 1
        raise getattr(psycopg.errors, error)

    monkeypatch.setattr(Database, "_rows", fails)
    with pytest.raises(getattr(psycopg.errors, error)):
        await Database(pool, SYSTEM).rows(raw("SELECT 1"))
    assert tried == attempts


async def test_reads_of_a_locked_table_fail_with_lock_errors(database_url: str) -> None:
    """Not with the error that a statement does not exist, because other queries could not prepare it."""
    name = f"t_{uuid4().hex}"
    read = Statement(select(column("n")).select_from(table(name, column("n"))))
    async with (
        Pool(database_url, size=5, wait=1) as pool,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other,
    ):
        await other.execute(f"CREATE TABLE {name} (n int); GRANT SELECT ON {name} TO api_system".encode())
        database = Database(pool, SYSTEM)
        async with other.transaction():
            await other.execute(f"LOCK TABLE {name}".encode())
            found: list[BaseException | list[Row]] = []
            for _ in range(3):
                found += await asyncio.gather(*(database.rows(read) for _ in range(20)), return_exceptions=True)
        assert {type(answer) for answer in found} <= {psycopg.errors.LockNotAvailable, PoolTimeout}
        assert await database.rows(read) == []
        await other.execute(f"DROP TABLE {name}".encode())


async def test_transactions_that_wait_for_a_lock_leave_a_connection_to_others(database_url: str) -> None:
    """Attempts do not extend the total time that they wait."""
    loop = asyncio.get_running_loop()
    lock = raw("SELECT pg_advisory_xact_lock(77)")

    async def wait_for_it(transaction: Transaction) -> None:
        await transaction.rows(lock)

    async with (
        Pool(database_url, size=8, wait=2) as pool,
        await psycopg.AsyncConnection.connect(database_url) as other,
    ):
        database = Database(pool, SYSTEM)
        await other.execute("SELECT pg_advisory_xact_lock(77)")
        begun = loop.time()
        blocked = [asyncio.create_task(database.transact(wait_for_it)) for _ in range(6)]
        await asyncio.sleep(0)
        assert await database.transact(lambda transaction: transaction.rows(raw("SELECT 1 AS one"))) == [{"one": 1}]
        assert not any(task.done() for task in blocked)
        answers = await asyncio.gather(*blocked, return_exceptions=True)
        assert loop.time() - begun < 3.9
    assert {type(answer) for answer in answers} == {psycopg.errors.LockNotAvailable, PoolTimeout}


async def test_the_transactions_of_one_user_leave_a_connection_to_others(database_url: str) -> None:
    blocked_user, other_user = Actor.user(uuid4()), Actor.user(uuid4())
    key = uuid4().int % 2**31
    async with (
        Pool(database_url, size=10, wait=30) as pool,
        await psycopg.AsyncConnection.connect(database_url) as other,
    ):
        await other.execute(f"SELECT pg_advisory_lock({key})".encode())

        async def wait(transaction: Transaction) -> None:
            await transaction.rows(raw(f"SELECT pg_advisory_xact_lock({key})"))

        async def read(transaction: Transaction) -> list[Row]:
            return await transaction.rows(raw("SELECT 1 AS one"))

        blocked = [asyncio.create_task(Database(pool, blocked_user).transact(wait)) for _ in range(100)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(2):  # 100 attempts of 50 ms each would take longer
            for actor in other_user, SYSTEM, other_user:
                assert await Database(pool, actor).transact(read) == [{"one": 1}]
        for task in blocked[10:]:
            task.cancel()
        await other.execute(f"SELECT pg_advisory_unlock({key})".encode())
        async with asyncio.timeout(20):
            await asyncio.gather(*blocked[:10])
            await asyncio.wait(blocked)
        del task
        blocked.clear()
        assert (pool.in_use, pool.waiting, len(pool._turns)) == (0, 0, 0)


async def test_a_transaction_that_makes_progress_keeps_its_connection(database_url: str) -> None:
    async def slow(transaction: Transaction) -> None:
        for _ in range(4):
            await transaction.rows(raw("SELECT pg_sleep(0.5)"))

    async with Pool(database_url, size=5, deadline=1.5) as pool:
        await Database(pool, SYSTEM).transact(slow)


async def test_keepalives_are_not_set_behind_a_pooler(database_url: str) -> None:
    """A pooler reports another process id than the server's."""
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        for pid, rows in (connection.info.backend_pid, 1), (connection.info.backend_pid + 1, 0):
            assert (await connection.execute(NOTICE_DEAD_CLIENT, (pid,))).rowcount == rows


@pytest.mark.parametrize("prepare", [True, False])
async def test_statements_are_prepared_unless_a_pooler_forbids_it(database_url: str, prepare: bool) -> None:
    async with Pool(database_url, size=5, prepare=prepare) as pool:
        database = Database(pool, SYSTEM)
        for _ in range(10):
            row = await database.row(raw("SELECT count(*) AS n FROM pg_prepared_statements"))
        assert row == {"n": 2 if prepare else 0}


async def test_dead_connections_are_replaced_without_a_pause(database_url: str) -> None:
    """After a restart of PostgreSQL; the pool itself would wait between attempts."""
    async with Pool(database_url, size=10, wait=2.5) as pool:
        async with AsyncExitStack() as stack:
            pids = {
                (await stack.enter_async_context(pool.connection())).info.backend_pid
                for _ in range(pool._pool.max_size)
            }
        with psycopg.connect(database_url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s) AS pid", (list(pids),))
        rows = await Database(pool, SYSTEM).transact(lambda transaction: transaction.rows(raw("SELECT 1 AS one")))
        assert rows == [{"one": 1}]
        async with pool.connection() as connection:
            assert connection.info.backend_pid not in pids
