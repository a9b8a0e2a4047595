"""The trash: restore, expiry after 30 days, and the purge."""

import asyncio
import logging
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from backend import migrations
from backend.database import SYSTEM, Database, Pool
from backend.operations.metrics import Metrics
from backend.resources import retention as purge_module
from backend.resources.retention import LOCK, expiring_tables, purge, purging
from tests.conftest import Api, Person, create_database
from tests.database.test_executor import raw
from tests.operations.test_metrics import read, value

TASKS = "/api/v1/tasks"
COUNT = raw("SELECT count(*) AS n FROM tasks WHERE id = ANY(CAST(:ids AS uuid[]))")
AGE = raw("UPDATE tasks SET deleted_at = now() - CAST(:age AS interval) WHERE id = ANY(CAST(:ids AS uuid[]))")


async def deleted(api: Api, person: Person, age: str, count: int = 1) -> list[dict[str, Any]]:
    """Create tasks that were deleted this long ago."""
    tasks = [await person.task(f"{number}") for number in range(count)]
    for task in tasks:
        await person.delete(f"{TASKS}/{task['id']}")
    await Database(api.state["pool"], SYSTEM).rows(AGE, age=age, ids=[task["id"] for task in tasks])
    return tasks


async def remaining(api: Api, tasks: list[dict[str, Any]]) -> int:
    row = await Database(api.state["pool"], SYSTEM).row(COUNT, ids=[task["id"] for task in tasks])
    assert row
    count: int = row["n"]
    return count


async def test_restore_returns_the_unchanged_task(api: Api) -> None:
    ada = api.person()
    task = await ada.task(status="done", description="d")
    url = f"{TASKS}/{task['id']}"
    await ada.delete(url)
    restored = await ada.post(f"{url}/restore")
    assert restored.status_code == 200
    assert restored.headers["etag"] == '"3"'
    body = restored.json()
    assert body == task | {"version": 3, "updated_at": body["updated_at"]}
    assert body["updated_at"] > task["updated_at"]
    assert (await ada.post(f"{url}/restore")).json() == body == (await ada.get(url)).json()


async def test_restore_checks_if_match(api: Api) -> None:
    ada = api.person()
    (task,) = await deleted(api, ada, "29 days")
    url = f"{TASKS}/{task['id']}/restore"
    stale = await ada.post(url, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "stale_version")
    assert (await ada.post(url, headers={"If-Match": '"2"'})).status_code == 200
    assert (await ada.post(url, headers={"If-Match": '"2"'})).status_code == 412


async def test_a_missing_task_is_a_404_before_it_is_a_412(api: Api) -> None:
    """With an id that is unknown, of another user, or of an expired task."""
    ada = api.person()
    others, (expired,) = await api.person().task(), await deleted(api, ada, "31 days")
    for id in uuid4(), others["id"], expired["id"]:
        for method, end in ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/restore"):
            for if_match in '"7"', "*":
                body = {"title": "x"} if method == "PATCH" else None
                response = await ada.request(method, f"{TASKS}/{id}{end}", json=body, headers={"If-Match": if_match})
                assert (response.status_code, response.json()["code"]) == (404, "not_found")
        for operation in {"op": "update", "changes": {"title": "x"}}, {"op": "delete"}:
            batch = {"operations": [{**operation, "id": f"{id}", "if_match": '"7"'}]}
            assert (await ada.post(f"{TASKS}/batch", batch)).status_code == 404


@pytest.mark.parametrize(("age", "exists"), [("29 days 23:59", True), ("30 days 00:00:01", False)])
async def test_no_route_finds_a_task_deleted_30_days_ago(api: Api, age: str, exists: bool) -> None:
    """Even if the purge has not run."""
    ada = api.person()
    (task,) = await deleted(api, ada, age)
    url = f"{TASKS}/{task['id']}"
    assert len((await ada.get(TASKS, params={"deleted": "true"})).json()["items"]) == exists
    for method in "GET", "PATCH", "PUT":
        if method == "PUT" and not exists:
            continue  # would create a task; see test_put.py
        body = {"title": "x"} if method != "GET" else None
        assert (await ada.request(method, url, json=body)).status_code == 404
    assert (await ada.delete(url)).status_code == (204 if exists else 404)
    assert (await ada.post(f"{url}/restore")).status_code == (200 if exists else 404)
    assert await remaining(api, [task]) == 1


async def test_the_purge_deletes_expired_tasks_only(api: Api) -> None:
    ada = api.person()
    old = await deleted(api, ada, "30 days 1 second", count=3)
    kept = [await ada.task(), *await deleted(api, ada, "29 days 23 hours")]
    assert await purge(api.state["pool"]) >= 3
    assert (await remaining(api, old), await remaining(api, kept)) == (0, 2)
    assert await purge(api.state["pool"]) == 0


@pytest.mark.parametrize(
    ("insert", "select"),
    [
        (
            "INSERT INTO security_events (issuer, jti, received_at)"
            " VALUES (:issuer, :age, now() - cast(cast(:age AS text) AS interval))",
            "SELECT jti AS age FROM security_events WHERE issuer = :issuer",
        ),
        (
            "INSERT INTO erasures (issuer, subject, roles, erased_at)"
            " VALUES (:issuer, :age, '{}', now() - cast(cast(:age AS text) AS interval))",
            "SELECT subject AS age FROM erasures WHERE issuer = :issuer",
        ),
    ],
    ids=["security events", "erasures"],
)
async def test_records_of_users_are_purged_after_30_days(api: Api, insert: str, select: str) -> None:
    system, issuer = Database(api.state["pool"], SYSTEM), uuid4().hex
    for age in "29 days 23 hours", "30 days 1 second":
        await system.rows(raw(insert), issuer=issuer, age=age)
    assert await purge(api.state["pool"]) >= 1
    assert await system.rows(raw(select), issuer=issuer) == [{"age": "29 days 23 hours"}]


async def test_concurrent_purges_delete_each_task_once(api: Api, database_url: str) -> None:
    await purge(api.state["pool"])
    old = await deleted(api, api.person(), "31 days", count=20)
    async with Pool(database_url, size=5) as pool:
        assert sum(await asyncio.gather(*(purge(pool) for _ in range(5)))) == 20
    assert await remaining(api, old) == 0


async def test_only_one_worker_purges_at_a_time(api: Api) -> None:
    old = await deleted(api, api.person(), "31 days")

    async def purging_worker(transaction: Any) -> None:
        assert await transaction.row(LOCK) == {"acquired": True}
        assert await purge(api.state["pool"]) == 0
        assert await remaining(api, old) == 1

    await Database(api.state["pool"], SYSTEM).transact(purging_worker)
    assert await purge(api.state["pool"]) >= 1


async def test_the_purge_continues_after_a_failure(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error, a database that is down, then a successful purge."""
    caplog.set_level(logging.INFO, purge_module.__name__)
    old = await deleted(api, api.person(), "31 days", count=5)
    unreachable = Pool("postgresql://user@127.0.0.1:9/nothing", size=5, wait=0.05)
    pools = iter([None, unreachable, api.state["pool"]])
    done = asyncio.Event()
    rounds = 0

    async def wait() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 4:
            done.set()
            await asyncio.Event().wait()

    async def purge_next_pool(_: Pool, metrics: Metrics | None) -> int:
        if pool := next(pools):
            return await purge(pool, metrics)
        raise ZeroDivisionError

    monkeypatch.setattr(purge_module, "purge", purge_next_pool)
    async with purging(api.state["pool"], wait):
        await done.wait()
    assert await remaining(api, old) == 0
    assert [record.levelname for record in caplog.records if record.name == purge_module.__name__] == [
        "WARNING",
        *["WARNING"] * len(expiring_tables()),
        "INFO",
        "INFO",
    ]


# One expired row of each table.
EXPIRED = """
INSERT INTO users (id, issuer, subject) VALUES ('00000000-0000-7000-8000-000000000001', 'i', 's');
INSERT INTO tasks (owner_id, title, status, priority, deleted_at)
VALUES ('00000000-0000-7000-8000-000000000001', 't', 'todo', 'low', now() - interval '31 days');
INSERT INTO idempotency_keys (owner_id, key, fingerprint, status, headers, body, created_at)
VALUES ('00000000-0000-7000-8000-000000000001', 'k', '', 200, '{}', '', now() - interval '25 hours');
INSERT INTO security_events (issuer, jti, received_at) VALUES ('i', 'j', now() - interval '31 days');
INSERT INTO erasures (issuer, subject, roles, erased_at) VALUES ('i', 'purged', '{}', now() - interval '31 days');
"""
FAIL_DELETES = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING ERRCODE = 'query_canceled'; END $$;
CREATE TRIGGER fail BEFORE DELETE ON {} EXECUTE FUNCTION fail();
"""
TABLES = ["tasks", "idempotency_keys", "security_events", "erasures"]


def count(connection: psycopg.Connection, table: str) -> int:
    (rows,) = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() or (0,)  # noqa: S608  # of TABLES
    return int(rows)


@pytest.mark.parametrize("failing", TABLES)
async def test_a_failure_in_one_table_does_not_stop_the_purge_of_the_others(
    postgres: str, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    url = create_database(postgres, f"purge_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    metrics = Metrics()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(EXPIRED)
        connection.execute(FAIL_DELETES.format(failing).encode())
        async with Pool(url, size=5) as pool:
            assert await purge(pool, metrics) == 3
            rows = {table: count(connection, table) for table in TABLES}
            assert rows == {table: int(table == failing) for table in TABLES}
            assert [record.getMessage() for record in caplog.records] == [
                f"the purge of {failing} failed: QueryCanceled"
            ]
            connection.execute(f"DROP TRIGGER fail ON {failing}".encode())
            assert await purge(pool, metrics) == 1
        assert count(connection, failing) == 0
    exposed = read((await metrics.exposition()).decode())
    for table in TABLES:
        assert value(exposed, "resource_server_purge_failures_total", table=table) == (table == failing)
        assert value(exposed, "resource_server_purge_last_success_timestamp_seconds", table=table) > 1e9


async def test_a_purge_has_several_batches_and_skips_locked_rows(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of two owners, one of whom is writing, and a stored response that another transaction has locked."""
    monkeypatch.setattr(purge_module, "OWNERS_PER_BATCH", 1)
    url = create_database(postgres, f"purge_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    lock = "SELECT pg_advisory_xact_lock(hashtextextended('changes of ' || '00000000-0000-7000-8000-000000000001', 0))"
    with psycopg.connect(url) as connection, psycopg.connect(url) as other:
        connection.execute(EXPIRED)
        connection.execute("INSERT INTO users (id, issuer, subject) VALUES (uuidv7(), 'i', 'other')")
        connection.execute(
            "INSERT INTO tasks (owner_id, title, status, priority, deleted_at) SELECT users.id, 't', 'todo', 'low',"
            " now() - interval '31 days' FROM users, generate_series(1, 2499)"
        )
        connection.execute(
            "INSERT INTO idempotency_keys (owner_id, key, fingerprint, status, headers, body, created_at)"
            " SELECT id, n::text, '', 200, '{}', '', now() - interval '25 hours' FROM users, generate_series(1, 1250) n"
        )
        connection.commit()
        other.execute(lock)
        other.execute("SELECT FROM idempotency_keys WHERE key = '7' FOR UPDATE")
        async with Pool(url, size=5) as pool:
            assert await purge(pool) == 2499 + 2499 + 2
            assert (count(connection, "tasks"), count(connection, "idempotency_keys")) == (2500, 2)
            other.rollback()
            assert await purge(pool) == 2502
            assert (count(connection, "tasks"), count(connection, "idempotency_keys")) == (0, 0)
