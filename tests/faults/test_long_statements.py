"""Long statements of one user delay neither other users nor health probes."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median

import psycopg
import pytest

from backend.auth.testing import LocalIssuer
from backend.operations import health
from backend.settings import Settings
from tests.conftest import Api, Person, running

TASKS = "/api/v1/tasks"
CONCURRENT_SEARCHES = 12
REQUESTS = 60
TEXTS = """
INSERT INTO tasks (owner_id, title, description, status, priority)
SELECT users.id, 'task ' || n, (SELECT string_agg(md5(n::text || m), ' ') FROM generate_series(1, 280) AS m),
       'todo', 'low'
FROM users, generate_series(1, 3000) AS n WHERE subject = %s
"""
ACTIVE = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND state = 'active' AND application_name = 'resource-server' AND query ~ 'strpos'
"""
OPEN = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'resource-server'"
)


@pytest.fixture(scope="module")
async def api(own_database: str, settings: Settings, issuer: LocalIssuer) -> AsyncIterator[Api]:
    values = {"database_url": own_database, "database_direct_url": own_database, "database_pool_size": 20}
    async with running(settings.model_copy(update=values), issuer) as api:
        yield api


@pytest.fixture(scope="module")
async def searcher(api: Api, own_database: str) -> Person:
    """A user with 3,000 tasks of about 9 kB."""
    searcher = api.person()
    await searcher.task()
    async with await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other:
        await other.execute(TEXTS, (searcher.subject,))
    return searcher


@asynccontextmanager
async def searching(searcher: Person) -> AsyncIterator[Counter[int]]:
    """Keep `CONCURRENT_SEARCHES` searches without a result running; yields the statuses of their responses."""
    statuses: Counter[int] = Counter()

    async def search(number: int) -> None:
        for turn in range(1000):
            response = await searcher.get(TASKS, params={"q": f"nothing {number} {turn}"})
            statuses[response.status_code] += 1
            assert response.status_code == 200 or response.json()["code"] == "database_busy"

    tasks = [asyncio.create_task(search(number)) for number in range(CONCURRENT_SEARCHES)]
    try:
        async with asyncio.timeout(30):
            while not statuses[200]:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.01)
        yield statuses
    finally:
        for task in tasks:
            task.cancel()
        ended, _ = await asyncio.wait(tasks)
    assert all(task.cancelled() for task in ended)


async def median_seconds(person: Person, path: str) -> float:
    """The median duration of a request."""
    taken = []
    for _ in range(REQUESTS):
        since = time.perf_counter()
        response = await person.get(path)
        taken.append(time.perf_counter() - since)
        assert response.status_code == 200, response.text
    return median(taken)


async def test_searches_of_one_user_do_not_delay_reads_of_another(
    api: Api, searcher: Person, own_database: str
) -> None:
    reader = api.person()
    task = await reader.task()
    active = []

    async def count_active(other: psycopg.AsyncConnection) -> None:
        while True:
            row = await (await other.execute(ACTIVE)).fetchone()
            assert row is not None
            active.append(row[0])
            await asyncio.sleep(0.02)

    alone = await median_seconds(reader, f"{TASKS}/{task['id']}")
    async with (
        await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other,
        searching(searcher) as searches,
    ):
        counting = asyncio.create_task(count_active(other))
        loaded = await median_seconds(reader, f"{TASKS}/{task['id']}")
        first_page = await median_seconds(reader, TASKS)
        async with asyncio.timeout(30):
            while searches.total() < 2 * CONCURRENT_SEARCHES or len(active) < 20:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.01)
        counting.cancel()
        await asyncio.wait({counting})
    assert max(loaded, first_page) < max(10 * alone, alone + 0.05), (alone, loaded, first_page)
    assert 1 <= max(active) <= 2, active


async def test_another_user_can_search_at_the_same_time(api: Api, searcher: Person) -> None:
    reader = api.person()
    await reader.task("a needle")
    async with searching(searcher):
        for _ in range(5):
            response = await reader.get(TASKS, params={"q": "needle", "count": "exact"})
            assert (response.status_code, response.json()["total"]) == (200, 1)


async def test_readiness_does_not_wait_for_the_requests_of_users(
    api: Api, searcher: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches and transactions occupy all connections of the pool."""
    monkeypatch.setattr(health, "MAX_AGE", 0)
    pool = api.state["pool"]

    async def hold() -> None:
        async with pool.connection() as connection:
            await connection.execute("SELECT pg_sleep(60)")

    async with searching(searcher):
        held = [asyncio.create_task(hold()) for _ in range(pool.size)]
        while not pool.waiting:  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0.01)
        for _ in range(20):
            response = await api.http.get("/readyz")
            assert response.status_code == 200, response.text
        for task in held:
            task.cancel()
        await asyncio.wait(held)


async def test_probes_share_one_connection(api: Api, own_database: str) -> None:
    async with await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other:

        async def connections() -> int:
            row = await (await other.execute(OPEN)).fetchone()
            assert row is not None
            count: int = row[0]
            return count

        assert (await api.http.get("/readyz")).status_code == 200
        before = await connections()
        for _ in range(3):
            answers = await asyncio.gather(*(api.http.get("/readyz") for _ in range(50)))
            assert {answer.status_code for answer in answers} == {200}
        assert await connections() == before


async def test_probes_within_a_second_share_one_statement(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    statements = []
    probe = api.state["schema"]._probe
    rows = probe.rows

    async def counted(sql: str) -> object:
        statements.append(sql)
        return await rows(sql)

    monkeypatch.setattr(probe, "rows", counted)
    monkeypatch.setattr(api.state["schema"], "_last", health._Result("unreachable", -1e9))
    for _ in range(3):
        answers = await asyncio.gather(*(api.http.get("/readyz") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
    assert len(statements) == 1
