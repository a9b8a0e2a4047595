"""The bin: out of it again, gone after 30 days for every route at once, and purged by whichever worker comes first."""

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
    """Tasks that were deleted this long ago."""
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


async def test_restore_brings_the_task_back_as_it_was(api: Api) -> None:
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


async def test_restore_heeds_if_match(api: Api) -> None:
    ada = api.person()
    (task,) = await deleted(api, ada, "29 days")
    url = f"{TASKS}/{task['id']}/restore"
    stale = await ada.post(url, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "stale_version")
    assert (await ada.post(url, headers={"If-Match": '"2"'})).status_code == 200
    assert (await ada.post(url, headers={"If-Match": '"2"'})).status_code == 412, "when it is back, too"


async def test_of_what_is_not_there_no_version_is_asked(api: Api) -> None:
    """Not for restore, either: an id that is unknown, somebody else's, or past its time is a 404 before it is a 412."""
    ada = api.person()
    others, (past,) = await api.person().task(), await deleted(api, ada, "31 days")
    for id in uuid4(), others["id"], past["id"]:
        for method, end in ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/restore"):
            for if_match in '"7"', "*":
                body = {"title": "x"} if method == "PATCH" else None
                answer = await ada.request(method, f"{TASKS}/{id}{end}", json=body, headers={"If-Match": if_match})
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        for operation in {"op": "update", "changes": {"title": "x"}}, {"op": "delete"}:
            batch = {"operations": [{**operation, "id": f"{id}", "if_match": '"7"'}]}
            assert (await ada.post(f"{TASKS}/batch", batch)).status_code == 404


@pytest.mark.parametrize(("age", "there"), [("29 days 23:59", True), ("30 days 00:00:01", False)])
async def test_after_thirty_days_it_is_gone_for_every_route(api: Api, age: str, there: bool) -> None:
    """Before any purge: nobody can tell whether it has run."""
    ada = api.person()
    (task,) = await deleted(api, ada, age)
    url = f"{TASKS}/{task['id']}"
    assert len((await ada.get(TASKS, params={"deleted": "true"})).json()["items"]) == there
    for method in "GET", "PATCH", "PUT":
        if method == "PUT" and not there:
            continue  # it makes a new one, see test_put.py
        body = {"title": "x"} if method != "GET" else None
        assert (await ada.request(method, url, json=body)).status_code == 404
    assert (await ada.delete(url)).status_code == (204 if there else 404)
    assert (await ada.post(f"{url}/restore")).status_code == (200 if there else 404)
    assert await remaining(api, [task]) == 1


async def test_the_purge_takes_what_has_expired_and_nothing_else(api: Api) -> None:
    ada = api.person()
    old = await deleted(api, ada, "30 days 1 second", count=3)
    kept = [await ada.task(), *await deleted(api, ada, "29 days 23 hours")]
    assert await purge(api.state["pool"]) >= 3
    assert (await remaining(api, old), await remaining(api, kept)) == (0, 2)
    assert await purge(api.state["pool"]) == 0


@pytest.mark.parametrize(
    ("note", "left"),
    [
        (
            "INSERT INTO security_events (issuer, jti, received_at)"
            " VALUES (:of, :age, now() - cast(cast(:age AS text) AS interval))",
            "SELECT jti AS age FROM security_events WHERE issuer = :of",
        ),
        (
            "INSERT INTO erasures (issuer, subject, roles, erased_at)"
            " VALUES (:of, :age, '{}', now() - cast(cast(:age AS text) AS interval))",
            "SELECT subject AS age FROM erasures WHERE issuer = :of",
        ),
    ],
    ids=["events", "erasures"],
)
async def test_what_was_noted_of_people_goes_after_30_days(api: Api, note: str, left: str) -> None:
    system, of = Database(api.state["pool"], SYSTEM), uuid4().hex
    for age in "29 days 23 hours", "30 days 1 second":
        await system.rows(raw(note), of=of, age=age)
    assert await purge(api.state["pool"]) >= 1
    assert await system.rows(raw(left), of=of) == [{"age": "29 days 23 hours"}]


async def test_several_workers_purge_each_task_once(api: Api, database_url: str) -> None:
    await purge(api.state["pool"])
    old = await deleted(api, api.person(), "31 days", count=20)
    async with Pool(database_url, size=5) as pool:
        assert sum(await asyncio.gather(*(purge(pool) for _ in range(5)))) == 20
    assert await remaining(api, old) == 0


async def test_whoever_comes_second_leaves_it_to_the_first(api: Api) -> None:
    old = await deleted(api, api.person(), "31 days")

    async def first(transaction: Any) -> None:
        assert await transaction.row(LOCK) == {"acquired": True}
        assert await purge(api.state["pool"]) == 0
        assert await remaining(api, old) == 1

    await Database(api.state["pool"], SYSTEM).transact(first)
    assert await purge(api.state["pool"]) >= 1


async def test_the_purge_goes_on_after_a_failure(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First of itself, then against a server that is not there, then in earnest; the fourth time it waits for good."""
    caplog.set_level(logging.INFO, purge_module.__name__)
    old = await deleted(api, api.person(), "31 days", count=5)
    pools = iter([None, Pool("postgresql://nobody@127.0.0.1:9/nothing", size=5, wait=0.05), api.state["pool"]])
    done = asyncio.Event()
    rounds = 0

    async def wait() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 4:
            done.set()
            await asyncio.Event().wait()

    async def from_the_next_pool(_: Pool, metrics: Metrics | None) -> int:
        if pool := next(pools):
            return await purge(pool, metrics)
        raise ZeroDivisionError

    monkeypatch.setattr(purge_module, "purge", from_the_next_pool)
    async with purging(api.state["pool"], wait):
        await done.wait()
    assert await remaining(api, old) == 0
    assert [record.levelname for record in caplog.records if record.name == purge_module.__name__] == [
        "WARNING",
        *["WARNING"] * len(expiring_tables()),
        "INFO",
        "INFO",
    ]


# One row that has expired of each kind that the purge removes, and how many of them there are.
EXPIRED = """
INSERT INTO users (id, issuer, subject) VALUES ('00000000-0000-7000-8000-000000000001', 'i', 's');
INSERT INTO tasks (owner_id, title, status, priority, deleted_at)
VALUES ('00000000-0000-7000-8000-000000000001', 't', 'todo', 'low', now() - interval '31 days');
INSERT INTO idempotency_keys (owner_id, key, fingerprint, status, headers, body, created_at)
VALUES ('00000000-0000-7000-8000-000000000001', 'k', '', 200, '{}', '', now() - interval '25 hours');
INSERT INTO security_events (issuer, jti, received_at) VALUES ('i', 'j', now() - interval '31 days');
INSERT INTO erasures (issuer, subject, roles, erased_at) VALUES ('i', 'gone', '{}', now() - interval '31 days');
"""
REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING ERRCODE = 'query_canceled'; END $$;
CREATE TRIGGER refuse BEFORE DELETE ON {} EXECUTE FUNCTION refuse();
"""
TABLES = ["tasks", "idempotency_keys", "security_events", "erasures"]


@pytest.mark.parametrize("failing", TABLES)
async def test_a_kind_that_fails_does_not_keep_the_others(
    postgres: str, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    url = create_database(postgres, f"purge_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    metrics = Metrics()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(EXPIRED)
        connection.execute(REFUSE.format(failing).encode())
        async with Pool(url, size=5) as pool:
            assert await purge(pool, metrics) == 3
            left = {table: count(connection, table) for table in TABLES}
            assert left == {table: int(table == failing) for table in TABLES}
            assert [record.getMessage() for record in caplog.records] == [
                f"the purge of {failing} failed: QueryCanceled"
            ]
            connection.execute(f"DROP TRIGGER refuse ON {failing}".encode())
            assert await purge(pool, metrics) == 1
        assert count(connection, failing) == 0
    told = read((await metrics.exposition()).decode())
    for table in TABLES:
        assert value(told, "resource_server_purge_failures_total", table=table) == (table == failing)
        assert value(told, "resource_server_purge_last_success_timestamp_seconds", table=table) > 1e9


def count(connection: psycopg.Connection, table: str) -> int:
    (found,) = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() or (0,)  # noqa: S608  # of TABLES
    return int(found)


async def test_more_than_a_batch_is_purged_and_what_is_held_is_left(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of two owners, one of whom is writing, and rows that another transaction holds; all of the same moment."""
    monkeypatch.setattr(purge_module, "OWNERS_PER_BATCH", 1)
    url = create_database(postgres, f"purge_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    held = "SELECT pg_advisory_xact_lock(hashtextextended('changes of ' || '00000000-0000-7000-8000-000000000001', 0))"
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
        other.execute(held)
        other.execute("SELECT FROM idempotency_keys WHERE key = '7' FOR UPDATE")
        async with Pool(url, size=5) as pool:
            assert await purge(pool) == 2499 + 2499 + 2
            assert (count(connection, "tasks"), count(connection, "idempotency_keys")) == (2500, 2)
            other.rollback()
            assert await purge(pool) == 2502
            assert (count(connection, "tasks"), count(connection, "idempotency_keys")) == (0, 0)
