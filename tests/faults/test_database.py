"""PostgreSQL stops, crashes, ends sessions, is locked, slow or full, under load: nothing is lost, and all is healed."""

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
from tests.faults.load import CLIENTS, PATIENCE, TASKS, Account, Load
from tests.support.programs import mounted

# A crash of its processes is what is tested, not one of the machine.
QUICK = {"fsync": "off", "full_page_writes": "off", "min_wal_size": "32MB", "max_wal_size": "32MB"}
SLACK = 1.0  # seconds, for a machine that is busy with other things
END = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name LIKE 'resource-server%' AND datname = current_database()"
)


@contextmanager
def own_server(place: Path) -> Iterator[EmbeddedPostgres]:
    place.chmod(0o711)  # as root, PostgreSQL runs as somebody else
    with EmbeddedPostgres(place / "data", settings=QUICK) as server:
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
    """The application on this database, with people who send each keyed write until it is there."""
    values = {"database_url": url, "database_direct_url": url, "database_pool_size": 5}
    async with (
        running(settings.model_copy(update=values), issuer) as api,
        Load(issuer, transport=api.http._transport, again=True).running() as load,
    ):
        yield api, load


def only_refused(account: Account) -> None:
    assert account.failed == 0, account
    assert account.statuses.keys() <= {200, 201, 409, 503}, account
    assert account.codes.keys() <= {"database_unavailable", "database_busy", "idempotency_key_in_use"}, account


@pytest.mark.parametrize("end", [EmbeddedPostgres.close, EmbeddedPostgres.kill], ids=["stopped", "killed"])
async def test_a_server_that_is_started_again(
    url: str, server: EmbeddedPostgres, settings: Settings, issuer: LocalIssuer, end: Callable[[EmbeddedPostgres], None]
) -> None:
    async with under_load(url, settings, issuer) as (api, load):
        await asyncio.to_thread(end, server)
        await load.answered(2 * CLIENTS, 503)
        assert (await api.http.get("/readyz")).status_code == 503
        assert (await api.http.get("/livez")).status_code == 200
        await asyncio.to_thread(server.start)
        await load.healed()
        async with asyncio.timeout(PATIENCE):  # what it says may be a second old
            while (await api.http.get("/readyz")).status_code != 200:  # noqa: ASYNC110  # of that there is no event
                await asyncio.sleep(0.05)
    load.account.check(url)
    only_refused(load.account)


async def test_sessions_that_are_ended(url: str, settings: Settings, issuer: LocalIssuer) -> None:
    """As by an administrator, or a failover: no read notices, and a write that was not under way does not either."""
    async with under_load(url, settings, issuer) as (_, load):
        with psycopg.connect(url, autocommit=True) as other:
            for _ in range(5):
                assert other.execute(END).rowcount > 1
                await load.answered(4 * CLIENTS)
    load.account.check(url)
    only_refused(load.account)
    assert load.account.answers["GET", 503] == 0
    assert load.account.statuses[503] <= 5 * CLIENTS


async def test_no_connection_to_be_had(url: str, settings: Settings, issuer: LocalIssuer) -> None:
    """Writes wait for a lock that somebody holds, hold all connections for writes, and are refused; reads go on."""
    async with under_load(url, settings, issuer) as (_, load):
        async with await psycopg.AsyncConnection.connect(url) as other:
            await other.execute("LOCK TABLE tasks IN EXCLUSIVE MODE")
            await load.answered(CLIENTS, 503)
        await load.healed()
    load.account.check(url)
    only_refused(load.account)
    assert load.account.codes.keys() == {"database_busy"}
    assert load.account.answers["GET", 503] == 0


class Question(NamedTuple):
    method: str
    path: str
    body: Mapping[str, str] | None = None


NEEDING_TASKS = [
    Question("GET", TASKS),
    Question("GET", f"{TASKS}/{{id}}"),
    Question("GET", f"{TASKS}?q=x"),
    Question("GET", f"{TASKS}/changes"),
    Question("GET", "/api/v1/tags"),
    Question("POST", TASKS, {"title": "new"}),
    Question("PUT", f"{TASKS}/{{id}}", {"title": "new"}),
]
OTHERS = [
    Question("GET", "/api/v1/users/me"),
    Question("PATCH", "/api/v1/users/me", {"locale": "de"}),
    Question("POST", "/api/v1/tags", {"name": "new"}),
]


async def test_a_locked_table_holds_up_nothing_else(
    url: str, settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """40 requests of all kinds at once, while another session holds the table of tasks for longer than any waits."""
    caplog.set_level(logging.CRITICAL, "backend.web.problems")
    values = {"database_url": url, "database_direct_url": url, "database_pool_size": 10}
    needing: list[tuple[Question, int, float]] = []
    others: list[tuple[Question, int, float]] = []

    async with running(settings.model_copy(update=values), issuer) as api:
        people = [api.person() for _ in range(8)]
        ids = [(await person.task())["id"] for person in people]

        async def ask(number: int, question: Question, found: list[tuple[Question, int, float]]) -> None:
            path, since = question.path.format(id=ids[number]), time.monotonic()
            response = await people[number].request(question.method, path, json=question.body)
            found.append((question, response.status_code, time.monotonic() - since))
            if response.status_code == 503:
                assert response.json()["code"] == "database_busy"
                assert int(response.headers["retry-after"]) >= 1

        # Half of the people need what is locked; no lock that they hold themselves keeps the other half waiting.
        asked = [ask(number, question, needing) for number in range(4) for question in NEEDING_TASKS]
        asked += [ask(number, question, others) for number in range(4, 8) for question in OTHERS]
        async with await psycopg.AsyncConnection.connect(url) as other:
            await other.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            await asyncio.gather(*asked)
        # The statements that could not be prepared are prepared now.
        again: list[tuple[Question, int, float]] = []
        for number in range(8):
            for question in NEEDING_TASKS:
                await ask(number, question, again)
    assert (len(needing), len(others)) == (28, 12)
    assert {status for _, status, _ in needing} == {503}, needing
    assert max(seconds for *_, seconds in needing) < 3.5 + SLACK, needing
    assert {status for _, status, _ in others} == {200, 201}, others
    assert max(seconds for *_, seconds in others) < 3, others
    assert {status for _, status, _ in again} == {200, 201}, again


async def test_statements_that_take_too_long(
    url: str, settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tenth of a second in place of ten."""
    monkeypatch.setattr("backend.database.executor.TRANSACT", TRANSACT.replace("'10s'", "'100ms'"))
    async with under_load(url, settings, issuer) as (_, load):
        async with await psycopg.AsyncConnection.connect(url) as other:
            await other.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            await load.answered(2 * CLIENTS, 503)
        await load.healed()
    load.account.check(url)
    only_refused(load.account)
    assert load.account.codes.keys() == {"database_busy"}


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of a size of its own, which can be full."""
    with tempfile.TemporaryDirectory() as name, mounted(Path(name), "size=192m,mode=711"):
        yield Path(name)


def fill(disk: Path) -> Path:
    """Take what is left, to the last block."""
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
async def test_a_disk_that_is_full(
    small_disk: Path, settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL refuses writes, or gives up when it cannot write its log; with room again it goes on."""
    caplog.set_level(logging.CRITICAL, "httpx")
    with own_server(small_disk) as server:
        url = create_database(server.url, "api")
        migrations.upgrade(url)
        async with under_load(url, settings, issuer) as (api, load):
            ballast = fill(small_disk)
            with psycopg.connect(url, autocommit=True) as other, pytest.raises(psycopg.Error):
                other.execute("CREATE TABLE large AS SELECT repeat('x', 1000) FROM generate_series(1, 200000)")
            await load.answered(2 * CLIENTS, 503)
            ballast.unlink()
            try:
                psycopg.connect(url).close()
            except psycopg.OperationalError:
                server.close()
                await asyncio.to_thread(server.start)
            await load.healed()
            assert (await api.http.get("/readyz")).status_code == 200
        load.account.check(url)
        only_refused(load.account)
