"""Live updates: streams miss no change, and end when their user loses access."""

import asyncio
import random
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from backend.auth.testing import LocalIssuer
from backend.database import SYSTEM, Database, Statement
from backend.settings import Settings
from backend.sync import broker, event_stream
from backend.sync.broker import HEARTBEAT, MAX_STREAMS, PERIOD, POLL, Broker
from backend.sync.event_stream import EVENTS, RETRY
from backend.tasks.statements import CHANGES
from tests.conftest import Api, running
from tests.database.test_executor import raw
from tests.support import following
from tests.support.following import PATIENCE, TASKS, Copy, Reader, reading
from tests.sync.test_changes import live, owner
from tests.tasks.test_trash import deleted


@pytest.fixture(autouse=True)
def fast_broker(api: Api, monkeypatch: pytest.MonkeyPatch) -> Broker:
    """The broker, which polls more often than in production."""
    found: Broker = api.state["broker"]
    monkeypatch.setattr(found, "period", 0.01)
    return found


async def test_a_stream_sends_the_changes_of_its_user(api: Api, fast_broker: Broker) -> None:
    ada, eve = api.person(), api.person()
    before = await ada.task("before")
    async with reading(api, ada, **{"Accept-Encoding": "gzip"}) as reader:
        headers = reader.headers
        assert headers["content-type"].startswith("text/event-stream")
        assert headers["x-accel-buffering"] == "no"
        assert headers["cache-control"] == "no-store"
        assert not {"content-length", "content-encoding"} & set(headers)
        await eve.task("another's")
        made = await ada.task("new", tags=["a"])
        event = await reader.next()
        assert (event.type, event.data) == ("task", made)
        changed = (await ada.patch(f"{TASKS}/{before['id']}", {"title": "changed"})).json()
        assert (await reader.next()).data == changed
        await ada.delete(f"{TASKS}/{before['id']}")
        gone = await reader.next()
        assert gone.data["id"] == before["id"]
        assert gone.data["deleted_at"]
        # The event's id is a sync token, and a sync token is a valid Last-Event-ID.
        copy = Copy(ada)
        copy.token = event.id
        assert [row["id"] for row in await copy.sync()] == [before["id"]]
        assert len(fast_broker) == 1
        assert b"\nresource_server_streams 1.0\n" in (await api.http.get("/metrics")).content
    assert len(fast_broker) == 0
    assert b"\nresource_server_streams 0.0\n" in (await api.http.get("/metrics")).content
    assert copy.token
    async with reading(api, ada, copy.token) as reader:
        made = await ada.task("newer")
        assert (await reader.next()).data == made


async def test_a_resumed_stream_sends_the_missed_changes(api: Api) -> None:
    ada = api.person()
    async with reading(api, ada) as reader:
        first = await ada.task("0")
        event = await reader.next()
        assert event.data == first
    missed = [await ada.task(f"{n}") for n in range(3)]
    async with reading(api, ada, event.id) as reader:
        assert [(await reader.next()).data for _ in missed] == missed
        made = await ada.task("after")
        assert (await reader.next()).data == made
    # Also after a stream that was interrupted before its first event.
    async with reading(api, ada) as reader:
        retry, line = await reader.block()
    assert RETRY[0] <= int(retry.removeprefix("retry: ")) / 1000 <= RETRY[1]
    made = await ada.task("unseen")
    async with reading(api, ada, line.removeprefix("id: ")) as reader:
        assert (await reader.next()).data == made


@pytest.mark.parametrize("token", ["", "x"])
async def test_an_invalid_last_event_id_is_refused(api: Api, token: str) -> None:
    reader = await Reader(api, api.person(), token).open()
    assert await reader.problem() == (422, "invalid_sync_token")


async def test_a_stream_without_authentication_scope_or_valid_position_is_refused(api: Api) -> None:
    ada, eve = api.person(), api.person()
    unauthenticated = Reader(api, ada)
    unauthenticated._headers = []
    assert await (await unauthenticated.open()).problem() == (401, "unauthorized")
    copy = Copy(ada)
    await copy.sync()
    await deleted(api, ada, "31 days")
    reader = await Reader(api, ada, copy.token).open()
    assert await reader.problem() == (410, "sync_token_expired")
    reader = await Reader(api, eve, copy.token).open()
    assert await reader.problem() == (410, "sync_token_expired")
    ada.bearer = {"Authorization": f"Bearer {api.issuer.access_token(sub=ada.subject, scope='tasks:write')}"}
    assert await (await Reader(api, ada).open()).problem() == (403, "insufficient_scope")


async def test_the_number_of_streams_of_a_user_is_limited(api: Api, fast_broker: Broker) -> None:
    ada, eve = api.person(), api.person()
    readers = [await Reader(api, ada).open() for _ in range(MAX_STREAMS)]
    assert {reader.status for reader in readers} == {200}
    assert await (await Reader(api, ada).open()).problem() == (429, "too_many_streams")
    async with reading(api, eve):
        pass
    await readers[0].close()
    async with reading(api, ada) as reader:
        made = await ada.task()
        for each in [*readers[1:], reader]:
            assert (await each.next()).data == made
    for each in readers:
        await each.close()
    assert len(fast_broker) == 0


END = {
    "suspended": "UPDATE users SET status = 'suspended' WHERE subject = :subject",
    "signed out everywhere": "UPDATE users SET tokens_valid_after = now() WHERE subject = :subject",
    "erased": "DELETE FROM users WHERE subject = :subject",
}


@pytest.mark.parametrize("how", END)
async def test_a_stream_ends_when_its_user_loses_access(api: Api, how: str) -> None:
    """Also without a notification: the statement that polls the change counters reads the user, too."""
    ada = api.person()
    ada.bearer = {"Authorization": f"Bearer {ada.token(iat=api.state['bearer'].verifier.clock() - 10)}"}
    async with reading(api, ada) as reader, reading(api, ada) as second:
        made = await ada.task()
        assert (await reader.next()).data == made
        await Database(api.state["pool"], SYSTEM).rows(raw(END[how]), subject=ada.subject)
        assert (await reader.next())[::2] == ("end", {"reason": "revoked"})
        await reader.task
        await second.next()
        assert (await second.next()).data == {"reason": "revoked"}


async def test_a_stream_with_a_later_token_survives_a_revocation(api: Api) -> None:
    ada = api.person()
    old, clock = api.person(sub=ada.subject), api.state["bearer"].verifier.clock
    old.bearer = {"Authorization": f"Bearer {old.token(iat=clock() - 60)}"}
    async with reading(api, ada) as reader, reading(api, old) as revoked:
        revoke = raw("UPDATE users SET tokens_valid_after = now() - interval '30 s' WHERE subject = :subject")
        await Database(api.state["pool"], SYSTEM).rows(revoke, subject=ada.subject)
        assert (await revoked.next()).data == {"reason": "revoked"}
        made = await ada.task()
        assert (await reader.next()).data == made


async def test_a_stream_ends_when_its_token_expires(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """At `exp` plus the leeway for clocks, when requests with the token are refused, too."""
    ada, verifier = api.person(), api.state["bearer"].verifier
    exp = int(verifier.clock()) + 600
    ada.bearer = {"Authorization": f"Bearer {ada.token(exp=exp)}"}
    monkeypatch.setattr(verifier, "clock", lambda: exp + verifier._leeway - 0.05)
    async with reading(api, ada) as reader:
        assert (await reader.next())[::2] == ("end", {"reason": "token_expired"})
        await reader.task
    monkeypatch.setattr(verifier, "clock", lambda: exp + verifier._leeway)
    assert await (await Reader(api, ada).open()).problem() == (401, "invalid_token")


async def test_a_stream_ends_when_the_server_shuts_down(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer) as api:
        ada = api.person()
        async with reading(api, ada) as reader:
            api.state["broker"].stop()
            assert (await reader.next())[::2] == ("end", {"reason": "shutdown"})
            await reader.task
        async with reading(api, ada) as reader:
            assert (await reader.next()).data == {"reason": "shutdown"}


async def test_a_stream_ends_even_if_its_client_does_not_read(
    api: Api, fast_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "GRACE", 0.05)
    ada = api.person()
    async with reading(api, ada) as reader:
        await ada.task()
        fast_broker._owners[await owner(ada)].streams.copy().pop().end("revoked")
        async with asyncio.timeout(PATIENCE):
            await reader.task
    assert len(fast_broker) == 0


async def test_a_stream_without_events_sends_comments(
    api: Api, fast_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"every {HEARTBEAT:.0f} seconds" in EVENTS[200]["description"]
    monkeypatch.setattr(fast_broker, "heartbeat", 0.02)
    ada = api.person()
    async with reading(api, ada) as reader:
        assert len(await reader.block()) == 2
        for _ in range(3):
            assert await reader.block() == [":"]
        made = await ada.task()
        assert (await reader.next()).data == made
        assert await reader.block() == [":"]


async def test_a_head_request_opens_no_stream(api: Api, fast_broker: Broker) -> None:
    reader = await Reader(api, api.person()).open("HEAD")
    assert reader.status == 200
    while (await reader.take()).get("more_body"):
        pass
    await reader.task
    assert len(fast_broker) == 0


async def test_a_row_deleted_without_a_tombstone_ends_the_streams(api: Api) -> None:
    ada = api.person()
    task = await ada.task()
    async with reading(api, ada) as reader, reading(api, ada) as second:
        gone = raw("DELETE FROM tasks WHERE owner_id = :owner AND id = CAST(:id AS uuid)")
        await Database(api.state["pool"], SYSTEM).rows(gone, owner=await owner(ada), id=task["id"])
        for each in reader, second:
            assert (await each.next())[::2] == ("end", {"reason": "sync_token_expired"})
        async with reading(api, ada) as third:
            made = await ada.task()
            assert (await third.next()).data == made
    again = await Reader(api, ada, reader.last).open()
    assert await again.problem() == (410, "sync_token_expired")


Executed = list[tuple[Statement, Mapping[str, Any]]]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Executed:
    """The statements that are executed, with their values."""
    found: Executed = []
    original = Database._rows

    async def recorded(self: Database, statement: Statement, values: Mapping[str, object]) -> Any:
        found.append((statement, values))
        return await original(self, statement, values)

    monkeypatch.setattr(Database, "_rows", recorded)
    return found


def polls(executed: Executed) -> list[set[UUID]]:
    """The users in each statement that polled for changes."""
    return [set(values["owners"]) for statement, values in executed if statement is POLL]


async def test_the_broker_does_not_poll_without_streams(
    api: Api, fast_broker: Broker, executed: Executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = api.person()
    async with Broker(api.state["pool"], period=0).polling():
        for _ in range(5):  # each request leaves time for a poll, since the period is 0
            await ada.task()
    assert polls(executed) == []
    monkeypatch.setattr(fast_broker, "period", 0)
    async with reading(api, ada):
        while not polls(executed):  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0)
    executed.clear()
    for _ in range(5):
        await ada.task()
    assert len(polls(executed)) <= 1


async def test_one_statement_polls_for_all_streams(api: Api, executed: Executed) -> None:
    """Each poll is one statement for all users, and the new rows of a user are read once for all their streams."""
    people = [api.person() for _ in range(4)]
    ids = [await owner(person) for person in people]
    readers = [await Reader(api, person).open() for person in people for _ in range(4)]
    assert len(readers) > api.state["pool"].size, "too few streams to show that none holds a connection"
    executed.clear()
    while len(polls(executed)) < 3:  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0)
    assert {statement for statement, _ in executed} == {POLL}
    assert all(owners == set(ids) for owners in polls(executed))
    for number in 1, 2:
        made = await people[0].task()
        assert [(await reader.next()).data for reader in readers[:4]] == [made] * 4
        assert [statement for statement, _ in executed].count(CHANGES) == number
    for reader in readers:
        await reader.close()


async def test_the_next_poll_sends_changes_and_ends_revoked_streams(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls are less than half a second apart, so that both happen within a second."""
    assert PERIOD < 0.5
    polled_by_hand = Broker(api.state["pool"])
    assert isinstance(api.state, dict)
    monkeypatch.setitem(api.state, "broker", polled_by_hand)
    ada = api.person()
    async with reading(api, ada) as reader:
        for _ in range(2):
            made = await ada.task()
            await polled_by_hand._poll()
            assert (await reader.next()).data == made
        await Database(api.state["pool"], SYSTEM).rows(raw(END["suspended"]), subject=ada.subject)
        await polled_by_hand._poll()
        assert (await reader.next()).data == {"reason": "revoked"}


async def test_a_restored_backup_ends_the_streams(api: Api) -> None:
    """Their position is above the highest change number, so that they would wait for it and miss changes."""
    ada, system = api.person(), Database(api.state["pool"], SYSTEM)
    await ada.task()
    number = raw("UPDATE change_counters SET n = :n WHERE owner_id = :owner")
    await system.rows(number, owner=await owner(ada), n=9)
    async with reading(api, ada) as reader:
        await system.rows(number, owner=await owner(ada), n=1)
        assert (await reader.next())[::2] == ("end", {"reason": "sync_token_expired"})
    assert await (await Reader(api, ada, reader.last).open()).problem() == (410, "sync_token_expired")
    async with reading(api, ada) as reader:
        made = await ada.task()
        assert (await reader.next()).data == made


async def test_a_stream_counts_as_one_request_of_the_quota(settings: Settings, issuer: LocalIssuer) -> None:
    """Independent of its duration and its events."""
    async with running(settings.model_copy(update={"rate_limit": "10/hour"}), issuer) as api:
        api.state["broker"].heartbeat = 0.01
        ada = api.person()
        async with reading(api, ada) as reader:
            assert reader.headers["ratelimit"].startswith('"user";r=9;')
            await ada.task()
            await reader.next()
            while await reader.block() != [":"]:
                pass
        assert (await ada.get(TASKS)).headers["ratelimit"].startswith('"user";r=7;')


async def test_streams_continue_after_a_database_outage(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ada = api.person()
    async with reading(api, ada) as reader:
        original, failed = Database._rows, asyncio.Event()

        async def unavailable(self: Database, statement: Statement, values: Mapping[str, object]) -> Any:
            if statement in (POLL, CHANGES):
                failed.set()
                raise psycopg.OperationalError("unavailable")
            return await original(self, statement, values)

        with monkeypatch.context() as patch, caplog.at_level("INFO", "backend.sync.broker"):
            patch.setattr(Database, "_rows", unavailable)
            made = [await ada.task(f"{n}") for n in range(2)]
            await failed.wait()
        assert [(await reader.next()).data for _ in made] == made
    assert [record.levelname for record in caplog.records if record.name == "backend.sync.broker"][:1] == ["WARNING"]


async def test_a_slow_stream_misses_no_change(api: Api, fast_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is bounded; a stream that is behind it reads from the database when its client reads."""
    monkeypatch.setattr(broker, "MAX_CACHED", 2000)
    monkeypatch.setattr(broker, "PAGE", 10)
    ada = api.person()
    async with reading(api, ada) as slow, reading(api, ada) as fast:
        operations = [{"op": "create", "task": {"title": f"{n}"}} for n in range(45)]
        made = (await ada.post(f"{TASKS}/batch", {"operations": operations})).json()["items"]
        rest = [await ada.task(f"{n}") for n in range(5)]
        ids = {task["id"] for task in made}
        received = [(await fast.next()).data for _ in range(50)]
        assert {task["id"] for task in received[:45]} == ids
        assert received[45:] == rest
        (channel,) = fast_broker._owners[await owner(ada)].channels.values()
        assert channel._size <= 2000
        assert [(await slow.next()).data for _ in range(50)] == received


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
async def test_a_copy_built_from_interrupted_streams_is_complete(api: Api, seed: int) -> None:
    """Four writers change tasks, while the stream is closed and resumed again and again."""
    rng = random.Random(seed)  # noqa: S311  # it chooses test data
    ada = api.person()
    ids = [str(uuid4()) for _ in range(8)]
    copy: dict[str, Any] = {}
    received: list[tuple[str, int, bool]] = []

    async def write() -> None:
        for _ in range(15):
            url = f"{TASKS}/{rng.choice(ids)}"
            match rng.randrange(4):
                case 0:
                    await ada.delete(url)
                case 1:
                    await ada.post(f"{url}/restore")
                case 2:
                    await ada.patch(url, {"title": uuid4().hex})
                case 3:
                    await ada.put(url, {"title": uuid4().hex, "tags": rng.sample(["a", "b"], 1)})

    async def follow(reader: Reader) -> None:
        event = await reader.next()
        received.append((event.data["id"], event.data["version"], event.data["deleted_at"] is None))
        copy.pop(event.data["id"], None)
        if event.data["deleted_at"] is None:
            copy[event.data["id"]] = event.data

    reader = await Reader(api, ada).open()
    writers = asyncio.gather(*(write() for _ in range(4)), ada.put(f"{TASKS}/{ids[0]}", {"title": "first"}))
    while not writers.done():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(following, "PATIENCE", 0.2)
            try:
                for _ in range(rng.randrange(1, 10)):
                    await follow(reader)
            except TimeoutError:
                pass
        await reader.close()
        reader = await Reader(api, ada, reader.last).open()
    await writers
    made = await ada.task("the last")
    while made["id"] not in copy:
        await follow(reader)
    await reader.close()
    assert copy == await live(ada)
    assert len(set(received)) == len(received)
