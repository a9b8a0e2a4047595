"""Notifications of changed user rows: they clear the cache, which is not used while one could be missed."""

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
from backend.users import cache_invalidation
from backend.users.cache_invalidation import Listener
from backend.users.provisioning import Suspended, Users
from backend.users.security_events.schemas import EventType
from backend.users.system_statements import FIND
from tests.conftest import ISSUER, Api, caught_up, create_database, running
from tests.database.test_executor import raw
from tests.support.relay import Relay

ME = "/api/v1/users/me"
SUSPEND = raw("UPDATE users SET status = 'suspended' WHERE subject = :subject")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Worker:
    """The pool, cache and listener of one process. The listener connects to PostgreSQL through a relay."""

    pool: Pool
    users: Users
    listener: Listener
    relay: Relay
    clock: Clock
    ada: Principal

    async def suspend(self) -> None:
        """Suspend the user in the database, as another process would."""
        await Database(self.pool, SYSTEM).rows(SUSPEND, subject=self.ada.subject)

    async def is_accepted(self) -> bool:
        try:
            await self.users.resolve(self.ada)
        except Suspended:
            return False
        return True

    async def needs_no_statement(self) -> bool:
        """Whether the cached row of the user is used."""
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
            assert await worker.is_accepted()
            assert await worker.needs_no_statement()
            yield worker


async def test_a_suspension_in_sql_applies_in_every_worker(api: Api, settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer) as other:
        ada = api.person()
        elsewhere = other.person(sub=ada.subject)
        assert (await ada.get(ME)).status_code == 200
        assert (await elsewhere.get(ME)).status_code == 200
        await Database(api.state["pool"], SYSTEM).rows(SUSPEND, subject=ada.subject)
        for worker, person in (api, ada), (other, elsewhere):
            await caught_up(worker.state["users"])
            assert (await person.get(ME)).json()["code"] == "account_suspended"


async def test_a_notification_arrives_before_the_response_to_a_later_statement(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guarantee of PostgreSQL on which the listener relies."""
    monkeypatch.setattr(cache_invalidation, "POLL_INTERVAL", 0.001)
    received: set[str] = set()
    missed: list[str] = []
    payload = ""
    invalidate, confirm = worker.users.invalidate, worker.users.confirm

    def watched_invalidate(subject: str) -> None:
        received.add(subject)
        invalidate(subject)

    def watched_confirm(at: float) -> None:
        if at >= worker.clock.now and payload not in received:
            missed.append(payload)
        confirm(at)

    monkeypatch.setattr(worker.users, "invalidate", watched_invalidate)
    monkeypatch.setattr(worker.users, "confirm", watched_confirm)
    for number in range(300):
        await Database(worker.pool, SYSTEM).rows(cache_invalidation.NOTIFY, payload=f"user{number}")
        payload = f"user{number}"
        worker.clock.now += 1
        await caught_up(worker.users)
    assert missed == []
    assert received >= {f"user{number}" for number in range(300)}  # rows of other tests may be reported, too


async def test_the_cache_is_confirmed_as_of_the_time_of_sending(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = worker.listener._execute

    async def slow(*of: Any) -> None:
        await execute(*of)
        worker.clock.now += 10

    monkeypatch.setattr(worker.listener, "_execute", slow)
    await caught_up(worker.users)
    assert worker.users._confirmed_at <= worker.clock.now - 10


async def test_a_row_that_changes_while_it_is_read_is_not_cached(
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
    assert await worker.is_accepted()
    assert changed
    assert not await worker.is_accepted()


async def test_a_row_that_is_read_while_the_connection_is_lost_is_not_cached(
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
        assert await worker.is_accepted()
    assert not await worker.is_accepted()


async def test_the_cache_is_unused_once_the_connection_is_lost(worker: Worker) -> None:
    worker.relay.refusing = True
    connection = worker.listener._connection
    assert connection is not None
    lost, confirm = asyncio.Event(), worker.users.confirm

    def watched(at: float) -> None:
        confirm(at)
        if at < 0:  # a response that was under way may be confirmed first
            lost.set()

    with patch.object(worker.users, "confirm", watched):
        async with worker.pool.connection() as another:
            await another.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
        async with asyncio.timeout(20):
            await lost.wait()
    assert not worker.users.is_current
    await worker.suspend()
    assert not await worker.is_accepted()
    worker.relay.refusing = False
    await caught_up(worker.users)
    assert not await worker.is_accepted()
    assert worker.users.is_current


async def test_the_cache_is_used_for_750_ms_after_the_connection_hangs(worker: Worker) -> None:
    worker.relay.hang()
    await worker.suspend()
    worker.clock.now += 0.75
    assert await worker.is_accepted()
    worker.clock.now += 0.001
    assert not await worker.is_accepted()


async def test_a_connection_that_hangs_is_replaced(worker: Worker) -> None:
    await worker.relay.accepted.get()
    worker.relay.hang()
    await worker.suspend()
    async with asyncio.timeout(20):
        await worker.relay.accepted.get()
    worker.clock.now += 1
    await caught_up(worker.users)
    assert not await worker.is_accepted()
    assert worker.users.is_current


async def test_the_cache_survives_a_pause_of_the_process(worker: Worker) -> None:
    """The connection queues notifications during the pause, so none is missed."""
    worker.clock.now += 59
    assert not worker.users.is_current
    await caught_up(worker.users)
    assert await worker.needs_no_statement()


async def test_a_cached_user_is_read_again_after_a_minute(worker: Worker) -> None:
    worker.clock.now += 60
    await caught_up(worker.users)
    assert not await worker.needs_no_statement()
    assert await worker.is_accepted()
    assert await worker.needs_no_statement()


async def test_a_new_connection_clears_the_cache(worker: Worker) -> None:
    worker.relay.drop()
    worker.clock.now += 1
    await caught_up(worker.users)
    assert not await worker.needs_no_statement()


async def test_invalidate_removes_a_user_without_a_notification(worker: Worker) -> None:
    worker.relay.hang()
    await worker.suspend()
    worker.users.invalidate(worker.ada.subject)
    assert not await worker.is_accepted()


@pytest.mark.parametrize("how", ["event", "suspension", "erasure"])
async def test_a_change_applies_in_its_own_process_before_the_notification(
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


async def test_the_application_starts_before_the_listener_can_connect(settings: Settings, issuer: LocalIssuer) -> None:
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


@pytest.mark.parametrize("through", ["another database", "an unreachable server"])
async def test_a_listener_without_notifications_logs_one_warning(
    postgres: str, database_url: str, through: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A transaction pooler or another database answers every statement, but delivers no notifications."""
    async with Relay(database_url) as relay, Pool(database_url, size=5) as pool:
        relay.refusing = True
        url = create_database(postgres, f"silent_{uuid4().hex[:8]}") if through == "another database" else relay.url
        users = Users(pool, ISSUER)
        listener = Listener(url, pool, users, patience=0.05)
        failed_thrice = asyncio.Event()
        report = listener._report
        attempts = 0

        def counted(error: Exception | None) -> None:
            nonlocal attempts
            report(error)
            attempts += 1
            if attempts == 3:
                failed_thrice.set()

        with caplog.at_level(logging.INFO), patch.object(listener, "_report", counted):
            async with listener:
                async with asyncio.timeout(20):
                    await failed_thrice.wait()
                assert not users.is_current
    (record,) = [record for record in caplog.records if record.name == cache_invalidation.__name__]
    assert ("DATABASE_DIRECT_URL" in record.getMessage()) == (through == "another database")
    assert url not in record.getMessage()


async def test_closing_does_not_wait_for_a_hanging_server(
    database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even during a statement that the server never answers. No warning is logged."""
    async with Relay(database_url) as relay, Pool(database_url, size=5) as pool:
        users = Users(pool, ISSUER)
        listener = Listener(relay.url, pool, users)
        sent = asyncio.Event()
        execute = listener._execute

        async def watched(*of: Any) -> None:
            if users.is_current:
                relay.hang()
                sent.set()
            await execute(*of)

        monkeypatch.setattr(listener, "_execute", watched)
        async with listener, asyncio.timeout(20):
            await sent.wait()
            relay.refusing = True
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
