"""What a worker remembers of people: forgotten when it changes, and not believed while a change could be missed."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest

from backend.auth import Principal
from backend.auth.testing import LocalIssuer
from backend.database import SYSTEM, Database, Pool, Row, Statement
from backend.settings import Settings
from backend.users import notifications
from backend.users.cache import Suspended, Users
from backend.users.notifications import Listener
from backend.users.security_events.schemas import EventType
from backend.users.system_statements import FIND
from tests.conftest import ISSUER, Api, caught_up, create_database, running
from tests.relay import Relay
from tests.test_database import raw

ME = "/api/v1/users/me"
SUSPEND = raw("UPDATE users SET status = 'suspended' WHERE subject = :subject")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Worker:
    """A pool, people and a listener as one process has them, the listener's way to PostgreSQL through a relay."""

    pool: Pool
    users: Users
    listener: Listener
    relay: Relay
    clock: Clock
    ada: Principal

    async def suspend(self) -> None:
        """As somebody else would, anywhere."""
        await Database(self.pool, SYSTEM).rows(SUSPEND, subject=self.ada.subject)

    async def is_let_in(self) -> bool:
        try:
            await self.users.resolve(self.ada)
        except Suspended:
            return False
        return True

    async def costs_nothing(self) -> bool:
        """Whether she is remembered, and what is remembered is believed."""
        with patch.object(Users, "_load", side_effect=AssertionError) as load:
            with suppress(AssertionError):
                await self.users.resolve(self.ada)
            return not load.called


@pytest.fixture
async def worker(database_url: str, issuer: LocalIssuer) -> AsyncIterator[Worker]:
    clock = Clock()
    async with Relay(database_url) as relay, Pool(database_url, size=5) as pool:
        users = Users(pool, ISSUER, monotonic=clock)
        listener = Listener(relay.url, pool, users, monotonic=clock, patience=0.2)
        ada = await issuer.verifier().verify(issuer.token(sub=uuid4().hex))
        async with listener:
            await caught_up(users)
            worker = Worker(pool, users, listener, relay, clock, ada)
            assert await worker.is_let_in()
            assert await worker.costs_nothing()
            yield worker


async def test_another_worker_refuses_at_once(api: Api, settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer) as other:
        ada = api.person()
        elsewhere = other.person(sub=ada.subject)
        assert (await ada.get(ME)).status_code == 200
        assert (await elsewhere.get(ME)).status_code == 200
        await Database(api.state["pool"], SYSTEM).rows(SUSPEND, subject=ada.subject)
        for worker, person in (api, ada), (other, elsewhere):
            await caught_up(worker.state["users"])
            assert (await person.get(ME)).json()["code"] == "account_suspended"


async def test_an_answer_shows_that_all_was_heard(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all the rest stands on: PostgreSQL delivers a notification before the answer to a later question."""
    monkeypatch.setattr(notifications, "POLL_INTERVAL", 0.001)
    told: set[str] = set()
    missed: list[str] = []
    word = ""
    forget, believe = worker.users.invalidate, worker.users.confirm

    def watched_forget(subject: str) -> None:
        told.add(subject)
        forget(subject)

    def watched_believe(at: float) -> None:
        if at >= worker.clock.now and word not in told:
            missed.append(word)
        believe(at)

    monkeypatch.setattr(worker.users, "invalidate", watched_forget)
    monkeypatch.setattr(worker.users, "confirm", watched_believe)
    for number in range(300):
        await Database(worker.pool, SYSTEM).rows(notifications.NOTIFY, payload=f"user{number}")
        word = f"user{number}"
        worker.clock.now += 1
        await caught_up(worker.users)
    assert missed == []
    assert len(told) == 300


async def test_it_is_the_moment_of_the_question_that_counts(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = worker.listener._execute

    async def slow(*of: Any) -> None:
        await ask(*of)
        worker.clock.now += 10

    monkeypatch.setattr(worker.listener, "_execute", slow)
    await caught_up(worker.users)
    assert worker.users._confirmed_at <= worker.clock.now - 10


async def test_a_row_read_before_a_change_and_had_after_it_is_not_remembered(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Database.row
    changed = False

    async def slow(self: Database, statement: Statement, **values: object) -> Row | None:
        nonlocal changed
        row = await original(self, statement, **values)
        if statement is FIND and not changed:
            changed = True
            await worker.suspend()
            await caught_up(worker.users)
        return row

    worker.users.invalidate_all()
    monkeypatch.setattr(Database, "row", slow)
    assert await worker.is_let_in()
    assert changed
    assert not await worker.is_let_in()


async def test_a_row_read_before_the_connection_was_lost_is_not_remembered(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Users._load

    async def slow(self: Users, *of: Any) -> Any:
        user = await original(self, *of)
        worker.relay.hang()
        await worker.suspend()
        self.invalidate_all()  # as the listener does when it has a connection again
        return user

    worker.users.invalidate_all()
    with monkeypatch.context() as patched:
        patched.setattr(Users, "_load", slow)
        assert await worker.is_let_in()
    assert not await worker.is_let_in()


async def test_nothing_is_believed_once_the_connection_is_lost(worker: Worker) -> None:
    worker.relay.refusing = True
    connection = worker.listener._connection
    assert connection is not None
    lost, believe = asyncio.Event(), worker.users.confirm

    def watched(at: float) -> None:
        believe(at)
        lost.set()

    with patch.object(worker.users, "confirm", watched):
        async with worker.pool.connection() as another:
            await another.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
        async with asyncio.timeout(20):
            await lost.wait()
    assert not worker.users.is_current
    await worker.suspend()
    assert not await worker.is_let_in()
    worker.relay.refusing = False
    await caught_up(worker.users)
    assert not await worker.is_let_in()
    assert worker.users.is_current


async def test_a_connection_that_hangs_is_believed_for_750_ms(worker: Worker) -> None:
    worker.relay.hang()
    await worker.suspend()
    worker.clock.now += 0.75
    assert await worker.is_let_in()
    worker.clock.now += 0.001
    assert not await worker.is_let_in()


async def test_a_connection_that_hangs_is_given_up(worker: Worker) -> None:
    await worker.relay.accepted.get()
    worker.relay.hang()
    await worker.suspend()
    async with asyncio.timeout(20):
        await worker.relay.accepted.get()
    worker.clock.now += 1
    await caught_up(worker.users)
    assert not await worker.is_let_in()
    assert worker.users.is_current


async def test_what_is_remembered_holds_as_long_as_the_connection_does(worker: Worker) -> None:
    """A process that was stopped for a while has missed nothing: it was all waiting for it."""
    worker.clock.now += 59
    assert not worker.users.is_current
    await caught_up(worker.users)
    assert await worker.costs_nothing()


async def test_who_is_remembered_is_asked_after_once_a_minute(worker: Worker) -> None:
    worker.clock.now += 60
    await caught_up(worker.users)
    assert not await worker.costs_nothing()
    assert await worker.is_let_in()
    assert await worker.costs_nothing()


async def test_a_new_connection_begins_with_nothing_remembered(worker: Worker) -> None:
    worker.relay.drop()
    worker.clock.now += 1
    await caught_up(worker.users)
    assert not await worker.costs_nothing()


async def test_what_this_process_changes_it_forgets_itself(worker: Worker) -> None:
    worker.relay.hang()
    await worker.suspend()
    worker.users.invalidate(worker.ada.subject)
    assert not await worker.is_let_in()


@pytest.mark.parametrize("how", ["event", "suspension", "erasure"])
async def test_what_a_process_did_holds_there_before_it_hears_of_it(
    settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async with Relay(settings.database_url) as relay:
        config = settings.model_copy(update={"database_direct_url": relay.url})
        async with running(config, issuer) as api:
            ada, root = api.person(), api.person(role="admin")
            await caught_up(api.state["users"])
            id = (await ada.get(ME)).json()["id"]
            relay.refusing = True
            relay.hang()
            monkeypatch.setattr(Users, "is_current", True)
            if how == "erasure":
                await ada.delete(ME)
                assert (await ada.get(ME)).json()["id"] != id
                return
            if how == "suspension":
                await root.post(f"/api/v1/admin/users/{id}/suspend")
            else:
                event = issuer.security_event(ada.subject, EventType.account_disabled)
                kind = {"Content-Type": "application/secevent+jwt"}
                await api.http.post("/api/v1/security-events", content=event, headers=kind)
            assert (await ada.get(ME)).json()["code"] == "account_suspended"


async def test_the_application_starts_without_a_listener_and_finds_it(settings: Settings, issuer: LocalIssuer) -> None:
    async with Relay(settings.database_url) as relay:
        relay.refusing = True
        config = settings.model_copy(update={"database_direct_url": relay.url})
        async with running(config, issuer) as api:
            ada = api.person()
            users: Users = api.state["users"]
            assert (await ada.get(ME)).status_code == 200
            assert not users.is_current
            await Database(api.state["pool"], SYSTEM).rows(SUSPEND, subject=ada.subject)
            assert (await ada.get(ME)).status_code == 403
            relay.refusing = False
            await caught_up(users)
            assert users.is_current


@pytest.mark.parametrize("through", ["another database", "a relay that is down"])
async def test_a_listener_that_cannot_hear_says_so_once(
    postgres: str, database_url: str, through: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A transaction pooler would swallow notifications, another database has others: each beat would be answered."""
    async with Relay(database_url) as relay, Pool(database_url, size=5) as pool:
        relay.refusing = True
        url = create_database(postgres, f"deaf_{uuid4().hex[:8]}") if through == "another database" else relay.url
        users = Users(pool, ISSUER)
        listener = Listener(url, pool, users, patience=0.05)
        tried = asyncio.Event()
        noted = listener._report
        attempts = 0

        def note(error: Exception | None) -> None:
            nonlocal attempts
            noted(error)
            attempts += 1
            if attempts == 3:
                tried.set()

        with caplog.at_level(logging.INFO), patch.object(listener, "_report", note):
            async with listener:
                async with asyncio.timeout(20):
                    await tried.wait()
                assert not users.is_current
    (record,) = [record for record in caplog.records if record.name == notifications.__name__]
    assert ("DATABASE_DIRECT_URL" in record.getMessage()) == (through == "another database")
    assert url not in record.getMessage()


async def test_leaving_waits_for_no_server_and_says_nothing(
    database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a question that a server which hangs never answers."""
    async with Relay(database_url) as relay, Pool(database_url, size=5) as pool:
        users = Users(pool, ISSUER)
        listener = Listener(relay.url, pool, users)
        asked = asyncio.Event()
        ask = listener._execute

        async def watched(*of: Any) -> None:
            if users.is_current:
                relay.hang()
                asked.set()
            await ask(*of)

        monkeypatch.setattr(listener, "_execute", watched)
        async with listener, asyncio.timeout(20):
            await asked.wait()
            relay.refusing = True
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
