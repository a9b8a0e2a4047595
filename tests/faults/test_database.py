"""PostgreSQL stops, crashes, terminates sessions, is locked, slow or full under load."""

import asyncio
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from backend import migrations
from backend.auth.testing import LocalIssuer
from backend.database.statements import TRANSACT
from backend.dev.postgres import EmbeddedPostgres
from backend.settings import Settings
from tests.conftest import Api, create_database, running
from tests.faults.load import CLIENTS, PATIENCE, TASKS, Load, Results
from tests.support.programs import mounted

# Without durability: the tests kill processes, not the machine.
SERVER_SETTINGS = {"fsync": "off", "full_page_writes": "off", "min_wal_size": "32MB", "max_wal_size": "32MB"}
SLACK = 1.0  # seconds, for a busy machine
TERMINATE_SESSIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name LIKE 'resource-server%' AND datname = current_database()"
)


@contextmanager
def own_server(place: Path) -> Iterator[EmbeddedPostgres]:
    place.chmod(0o711)  # as root, PostgreSQL runs as another user
    with EmbeddedPostgres(place / "data", settings=SERVER_SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    with tempfile.TemporaryDirectory() as name, own_server(Path(name)) as server:
        yield server


@pytest.fixture(scope="module")
def url(server: EmbeddedPostgres) -> str:
    url = create_database(server.url, "api")
    migrations.upgrade(url)
    return url


@asynccontextmanager
async def under_load(url: str, settings: Settings, issuer: LocalIssuer) -> AsyncIterator[tuple[Api, Load]]:
    """The application on this database, and clients that repeat each write with a key until it is acknowledged."""
    values = {"database_url": url, "database_direct_url": url, "database_pool_size": 5}
    async with (
        running(settings.model_copy(update=values), issuer) as api,
        Load(issuer, transport=api.http._transport, retry=True).running() as load,
    ):
        yield api, load


def assert_only_refusals(results: Results) -> None:
    assert results.failed == 0, results
    assert results.statuses.keys() <= {200, 201, 409, 503}, results
    assert results.codes.keys() <= {"database_unavailable", "database_busy", "idempotency_key_in_use"}, results


@pytest.mark.parametrize("end", [EmbeddedPostgres.close, EmbeddedPostgres.kill], ids=["stopped", "killed"])
async def test_requests_succeed_after_postgresql_was_restarted(
    url: str, server: EmbeddedPostgres, settings: Settings, issuer: LocalIssuer, end: Callable[[EmbeddedPostgres], None]
) -> None:
    async with under_load(url, settings, issuer) as (api, load):
        await asyncio.to_thread(end, server)
        await load.wait_for_responses(2 * CLIENTS, 503)
        assert (await api.http.get("/readyz")).status_code == 503
        assert (await api.http.get("/livez")).status_code == 200
        await asyncio.to_thread(server.start)
        await load.wait_until_healthy()
        async with asyncio.timeout(PATIENCE):  # the result is cached for a second
            while (await api.http.get("/readyz")).status_code != 200:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.05)
    load.results.check(url)
    assert_only_refusals(load.results)


async def test_terminated_sessions_fail_only_writes_in_progress(
    url: str, settings: Settings, issuer: LocalIssuer
) -> None:
    """As by an administrator or a failover. Reads are repeated."""
    async with under_load(url, settings, issuer) as (_, load):
        with psycopg.connect(url, autocommit=True) as other:
            for _ in range(5):
                assert other.execute(TERMINATE_SESSIONS).rowcount > 1
                await load.wait_for_responses(4 * CLIENTS)
    load.results.check(url)
    assert_only_refusals(load.results)
    assert load.results.by_method["GET", 503] == 0
    assert load.results.statuses[503] <= 5 * CLIENTS


async def test_writes_blocked_by_a_lock_are_refused_and_reads_succeed(
    url: str, settings: Settings, issuer: LocalIssuer
) -> None:
    """The blocked writes occupy all connections for writes. On a busy machine, connecting may take longer than a write
    is queued, which is then refused as `database_unavailable`."""
    async with under_load(url, settings, issuer) as (_, load):
        async with await psycopg.AsyncConnection.connect(url) as other:
            await other.execute("LOCK TABLE tasks IN EXCLUSIVE MODE")
            await load.wait_for_responses(CLIENTS, 503)
        await load.wait_until_healthy()
    load.results.check(url)
    assert_only_refusals(load.results)
    assert load.results.codes["database_busy"]
    assert load.results.by_method["GET", 503] == 0


class Operation(NamedTuple):
    method: str
    path: str
    body: Mapping[str, str] | None = None


ON_TASKS = [
    Operation("GET", TASKS),
    Operation("GET", f"{TASKS}/{{id}}"),
    Operation("GET", f"{TASKS}?q=x"),
    Operation("GET", f"{TASKS}/changes"),
    Operation("GET", "/api/v1/tags"),
    Operation("POST", TASKS, {"title": "new"}),
    Operation("PUT", f"{TASKS}/{{id}}", {"title": "new"}),
]
OTHERS = [
    Operation("GET", "/api/v1/users/me"),
    Operation("PATCH", "/api/v1/users/me", {"locale": "de"}),
    Operation("POST", "/api/v1/tags", {"name": "new"}),
]


async def test_a_locked_table_delays_only_requests_that_use_it(
    url: str, settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """40 concurrent requests, while another session holds a lock for longer than any request waits."""
    caplog.set_level(logging.CRITICAL, "backend.web.problems")
    values = {"database_url": url, "database_direct_url": url, "database_pool_size": 10}
    on_tasks: list[tuple[Operation, int, float]] = []
    others: list[tuple[Operation, int, float]] = []

    async with running(settings.model_copy(update=values), issuer) as api:
        people = [api.person() for _ in range(8)]
        ids = [(await person.task())["id"] for person in people]

        async def send(number: int, operation: Operation, found: list[tuple[Operation, int, float]]) -> None:
            path, since = operation.path.format(id=ids[number]), time.monotonic()
            response = await people[number].request(operation.method, path, json=operation.body)
            found.append((operation, response.status_code, time.monotonic() - since))
            if response.status_code == 503:
                assert response.json()["code"] == "database_busy"
                assert int(response.headers["retry-after"]) >= 1

        # Half of the users use the locked table, so that their own locks do not delay the other half.
        requests = [send(number, operation, on_tasks) for number in range(4) for operation in ON_TASKS]
        requests += [send(number, operation, others) for number in range(4, 8) for operation in OTHERS]
        async with await psycopg.AsyncConnection.connect(url) as other:
            await other.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            await asyncio.gather(*requests)
        # Statements that could not be prepared are prepared now.
        retry: list[tuple[Operation, int, float]] = []
        for number in range(8):
            for operation in ON_TASKS:
                await send(number, operation, retry)
    assert (len(on_tasks), len(others)) == (28, 12)
    assert {status for _, status, _ in on_tasks} == {503}, on_tasks
    assert max(seconds for *_, seconds in on_tasks) < 3.5 + SLACK, on_tasks
    assert {status for _, status, _ in others} == {200, 201}, others
    assert max(seconds for *_, seconds in others) < 3, others
    assert {status for _, status, _ in retry} == {200, 201}, retry


@pytest.mark.full
async def test_slow_statements_are_cancelled_and_refused(
    url: str, settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of 0.1 s instead of 10 s."""
    monkeypatch.setattr("backend.database.executor.TRANSACT", TRANSACT.replace("'10s'", "'100ms'"))
    async with under_load(url, settings, issuer) as (_, load):
        async with await psycopg.AsyncConnection.connect(url) as other:
            await other.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            await load.wait_for_responses(2 * CLIENTS, 503)
        await load.wait_until_healthy()
    load.results.check(url)
    assert_only_refusals(load.results)
    assert load.results.codes["database_busy"]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """The folder of a small file system."""
    with tempfile.TemporaryDirectory() as name, mounted(Path(name), "size=192m,mode=711"):
        yield Path(name)


def fill(disk: Path) -> Path:
    """Fill a file system to the last block; the path of the file that does."""
    ballast = disk / "ballast"

    def write_forever() -> None:
        with ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_forever()
    assert shutil.disk_usage(disk).free < 65536
    return ballast


@pytest.mark.needs("tmpfs")
async def test_a_full_disk_refuses_writes_until_there_is_space(
    small_disk: Path, settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL refuses writes, or stops when it cannot write its log."""
    caplog.set_level(logging.CRITICAL, "httpx")
    with own_server(small_disk) as server:
        url = create_database(server.url, "api")
        migrations.upgrade(url)
        async with under_load(url, settings, issuer) as (api, load):
            ballast = fill(small_disk)
            with psycopg.connect(url, autocommit=True) as other, pytest.raises(psycopg.Error):
                other.execute("CREATE TABLE large AS SELECT repeat('x', 1000) FROM generate_series(1, 200000)")
            await load.wait_for_responses(2 * CLIENTS, 503)
            ballast.unlink()
            try:
                psycopg.connect(url).close()
            except psycopg.OperationalError:
                server.close()
                await asyncio.to_thread(server.start)
            await load.wait_until_healthy()
            assert (await api.http.get("/readyz")).status_code == 200
        load.results.check(url)
        assert_only_refusals(load.results)
