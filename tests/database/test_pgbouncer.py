"""The API behind pgbouncer in transaction mode: isolation, time zones and revocation."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import psycopg
import pytest

from backend import migrations
from backend.auth.testing import LocalIssuer
from backend.database import SYSTEM, Actor, Database, Transaction
from backend.settings import Settings
from tests.conftest import Api, caught_up, create_database, running
from tests.database.test_executor import raw
from tests.support.pgbouncer import SHARED, pooler

TASKS = "/api/v1/tasks"
ME = "/api/v1/users/me"
CALLER = raw("SELECT current_user AS role, current_setting('app.caller') AS caller, pg_backend_pid() AS pid")

pytestmark = pytest.mark.needs("pgbouncer")


@pytest.fixture(scope="module")
def direct(postgres: str) -> str:
    """The URL of PostgreSQL itself, and a database whose time zone is not UTC."""
    url = create_database(postgres, f"pooled_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET timezone TO 'America/New_York'".encode())
    return url


@pytest.fixture(scope="module")
def pooled(direct: str) -> Iterator[str]:
    with pooler(direct) as url:
        yield url


@pytest.fixture(scope="module")
def pooled_settings(settings: Settings, pooled: str, direct: str) -> Settings:
    values = {"database_url": pooled, "database_direct_url": direct, "database_prepare": "off"}
    return settings.model_copy(update=values)


@pytest.fixture(scope="module")
async def api(pooled_settings: Settings, issuer: LocalIssuer) -> AsyncIterator[Api]:
    async with running(pooled_settings, issuer) as api:
        yield api


async def test_each_statement_runs_as_its_caller_on_shared_connections(api: Api) -> None:
    """In the pipeline and in transactions, between statements that fail."""
    actors = [Actor.user(uuid4()) for _ in range(30)] + [SYSTEM] * 10
    fails = raw("SELECT 1 / 0")

    async def caller_of(actor: Actor) -> tuple[str, str, int]:
        database = Database(api.state["pool"], actor)

        async def read_twice(transaction: Transaction) -> None:
            first, second = await transaction.row(CALLER), await transaction.row(CALLER)
            assert first == second == {"role": actor.role, "caller": actor.id, "pid": first["pid"] if first else 0}

        with pytest.raises(psycopg.errors.DivisionByZero):
            await database.rows(fails)
        row, _ = await asyncio.gather(database.row(CALLER), database.transact(read_twice))
        assert row
        return row["role"], row["caller"], row["pid"]

    for _ in range(3):
        found = await asyncio.gather(*map(caller_of, actors))
        assert [(role, caller) for role, caller, _ in found] == [(actor.role, actor.id) for actor in actors]
    assert 1 <= len({pid for *_, pid in found}) <= SHARED


async def test_no_setting_or_prepared_statement_is_left_on_a_connection(api: Api, direct: str, pooled: str) -> None:
    for actor in Actor.user(uuid4()), SYSTEM:
        await Database(api.state["pool"], actor).rows(CALLER)
    query = (
        "SELECT current_user = session_user, coalesce(current_setting('app.caller', true), ''),"
        " (SELECT count(*) FROM pg_prepared_statements),"
        " (SELECT count(*) FROM pg_settings WHERE source = 'session' AND name ~ '^tcp|timeout$')"
    )
    others = [psycopg.connect(pooled, prepare_threshold=None) for _ in range(SHARED)]
    try:
        for other in others:  # their open transactions occupy all connections of the pooler
            assert other.execute(query).fetchone() == (True, "", 0, 0)
        pids = {other.execute("SELECT pg_backend_pid()").fetchone() for other in others}
    finally:
        for other in others:
            other.close()
    with psycopg.connect(direct) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'resource-server'"
        )
        assert set(rows.fetchall()) <= pids


async def test_concurrent_users_see_only_their_rows(api: Api) -> None:
    """After writes by a statement, a batch and a transaction with an Idempotency-Key."""
    people = [api.person() for _ in range(12)]

    async def work(number: int) -> None:
        person = people[number]
        for turn in range(3):
            task = await person.task(f"{number} {turn}", tags=[f"tag {number}"])
            operations = [{"op": "create", "task": {"title": f"{number} {turn} b"}}]
            answer = await person.post(f"{TASKS}/batch", {"operations": operations})
            assert answer.status_code == 200, answer.text
            answer = await person.post(TASKS, {"title": f"{number} {turn} c"}, headers={"Idempotency-Key": uuid4().hex})
            assert answer.status_code == 201, answer.text
            answer = await person.patch(f"{TASKS}/{task['id']}", {"title": f"{number} {turn} a"})
            assert answer.status_code == 200, answer.text

    await asyncio.gather(*map(work, range(len(people))))
    for number, person in enumerate(people):
        items = (await person.get(TASKS, params={"limit": 100})).json()["items"]
        assert {item["title"] for item in items} == {f"{number} {turn} {kind}" for turn in range(3) for kind in "abc"}
        assert [tag["name"] for tag in (await person.get("/api/v1/tags")).json()["items"]] == [f"tag {number}"]


async def test_times_are_utc_although_another_client_set_a_time_zone(api: Api, pooled: str) -> None:
    """The zone of the database, and one that was set on a shared connection."""
    ada = api.person()
    with psycopg.connect(pooled, autocommit=True, prepare_threshold=None) as other:
        for zone in "", "SET timezone = 'Asia/Tokyo'":
            if zone:
                other.execute(zone.encode())
            for tags in [], ["home"]:  # a single statement, and a transaction
                made = await ada.post(TASKS, {"title": "due", "due_at": "2026-07-01T12:00:00-04:00", "tags": tags})
                found = await ada.get(made.headers["location"])
                for task in made.json(), found.json():
                    assert task["due_at"] == "2026-07-01T16:00:00Z"
                    assert task["created_at"].endswith("Z")
            rows = await Database(api.state["pool"], SYSTEM).rows(raw("SELECT timestamptz '2026-07-01 12:00+00' AS at"))
            assert rows[0]["at"].isoformat() == "2026-07-01T12:00:00+00:00"


async def test_a_suspension_takes_effect_in_all_workers(
    api: Api, pooled_settings: Settings, issuer: LocalIssuer
) -> None:
    async with running(pooled_settings, issuer) as other:
        ada = api.person()
        elsewhere = other.person(sub=ada.subject)
        for worker, person in (api, ada), (other, elsewhere):
            assert (await person.get(ME)).status_code == 200
            await caught_up(worker.state["users"])
            assert worker.state["users"].is_current
        await Database(api.state["pool"], SYSTEM).rows(
            raw("UPDATE users SET status = 'suspended' WHERE subject = :subject"), subject=ada.subject
        )
        for worker, person in (api, ada), (other, elsewhere):
            await caught_up(worker.state["users"])
            assert (await person.get(ME)).json()["code"] == "account_suspended"


async def test_a_listener_behind_the_pooler_is_reported_and_each_request_reads_the_user(
    pooled_settings: Settings, pooled: str, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(pooled_settings.model_copy(update={"database_direct_url": pooled}), issuer) as api:
        ada = api.person()
        assert (await ada.get(ME)).status_code == 200
        async with asyncio.timeout(30):
            while "DATABASE_DIRECT_URL" not in caplog.text:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.05)
        assert not api.state["users"].is_current
        await Database(api.state["pool"], SYSTEM).rows(
            raw("UPDATE users SET status = 'suspended' WHERE subject = :subject"), subject=ada.subject
        )
        assert (await ada.get(ME)).json()["code"] == "account_suspended"
