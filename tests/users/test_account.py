"""Export and erasure of the caller's account."""

import asyncio
import json
import tracemalloc
from typing import Any

import psycopg
import pytest
from starlette.types import Message

from backend.database import SYSTEM, Database
from backend.users import export, lifecycle
from tests.conftest import BASE, Api, Person
from tests.database.test_executor import raw
from tests.users.test_lifecycle import api_key_tokens, as_system, count_rows, create_data, id_of

ME = "/api/v1/users/me"
EXPORT = f"{ME}/export"
TASKS = "/api/v1/tasks"

INSERT_TASKS = raw(
    "INSERT INTO tasks (owner_id, title, status, priority)"
    " SELECT :id, 'task ' || n, 'todo', 'low' FROM generate_series(1, cast(:number AS int)) n"
)


async def with_tasks(api: Api, number: int) -> Person:
    person = api.person()
    await Database(api.state["pool"], SYSTEM).rows(INSERT_TASKS, id=await id_of(person), number=number)
    return person


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_an_export_contains_every_row_of_the_user(api: Api) -> None:
    ada, eve = api.person(name="Ada", email="ada@example.com"), api.person()
    for person in ada, eve:
        await create_data(person)
    id = await id_of(ada)
    response = await ada.get(EXPORT)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
    assert response.headers["content-disposition"].startswith('attachment; filename="export-20')
    assert response.headers["cache-control"] == "no-store"
    first, *rows, last = lines_of(response.text)
    assert (first["kind"], first["format"], first["subject"]) == ("export", 1, ada.subject)
    assert last == {"kind": "end", "rows": len(rows)}
    found = {name: sum(row["kind"] == name for row in rows) for name in first["tables"]}
    assert found == {"users": 1, **{name: n for name, n in (await count_rows(api, id)).items() if name in found}}
    assert set(found) >= {"users", "tasks", "tags", "task_tags", "idempotency_keys"}
    assert rows[0]["row"]["email"] == "ada@example.com"
    assert not any("owner_id" in row["row"] for row in rows)


async def test_an_export_of_several_batches_has_each_row_once(api: Api) -> None:
    for number in 0, export.BATCH, 2 * export.BATCH + 1:
        ada = await with_tasks(api, number)
        for encoding in "identity", "gzip":
            response = await ada.get(EXPORT, headers={"Accept-Encoding": encoding})
            titles = [line["row"]["title"] for line in lines_of(response.text) if line["kind"] == "tasks"]
            assert len(titles) == len(set(titles)) == number


class Reader:
    """A client whose reading speed the test controls."""

    def __init__(self, api: Api, person: Person) -> None:
        self.api = api
        headers = [(name.lower().encode(), value.encode()) for name, value in person.bearer.items()]
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": EXPORT,
            "raw_path": EXPORT.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
            "state": dict(api.state),
        }
        self.chunks = 0
        self.peak_memory = 0
        self.connections_in_use: set[int] = set()
        self.last_chunk = b""
        self.disconnected = asyncio.Event()

    async def receive(self) -> Message:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.connections_in_use.add(len(self.api.state["pool"]._last_response))
        self.chunks += 1
        self.peak_memory = max(self.peak_memory, tracemalloc.get_traced_memory()[0])
        self.last_chunk = message.get("body") or self.last_chunk

    async def read(self) -> None:
        await self.api.app(self.scope, self.receive, self.send)


async def test_an_export_of_any_length_needs_constant_memory_and_holds_no_connection(api: Api) -> None:
    peaks = []
    for batches in 5, 25:
        reader = Reader(api, await with_tasks(api, batches * export.BATCH))
        tracemalloc.start()
        await reader.read()
        tracemalloc.stop()
        assert reader.chunks > batches
        assert reader.connections_in_use == {0}
        assert json.loads(reader.last_chunk.splitlines()[-1])["kind"] == "end"
        peaks.append(reader.peak_memory)
    assert peaks[1] < 1.5 * peaks[0] + 500_000, peaks


async def test_an_export_ends_when_the_client_disconnects(api: Api) -> None:
    reader = Reader(api, await with_tasks(api, 10 * export.BATCH))
    waiting = asyncio.Event()

    async def send(_: Message) -> None:
        if reader.chunks == 3:
            waiting.set()
            await asyncio.Event().wait()
        reader.chunks += 1

    reading = asyncio.create_task(api.app(reader.scope, reader.receive, send))
    await waiting.wait()
    reader.disconnected.set()
    async with asyncio.timeout(10):
        await reading
    assert reader.chunks == 3


async def test_an_interrupted_export_has_no_end_line(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(api, await with_tasks(api, 3 * export.BATCH))
    original = Database.rows

    async def lost(self: Database, *arguments: Any, **values: Any) -> Any:
        if "after_id" in values:
            raise psycopg.OperationalError
        return await original(self, *arguments, **values)

    monkeypatch.setattr(Database, "rows", lost)
    await reader.read()
    assert json.loads(reader.last_chunk.splitlines()[-1])["kind"] == "tasks"


async def test_an_erasure_deletes_everything_and_the_next_request_creates_an_account(api: Api) -> None:
    ada, eve = api.person(name="Ada"), api.person()
    for person in ada, eve:
        await create_data(person)
    id, theirs = await id_of(ada), await count_rows(api, await id_of(eve))
    response = await ada.delete(ME)
    assert (response.status_code, response.content) == (204, b"")
    assert not any((await count_rows(api, id)).values())
    assert await count_rows(api, await id_of(eve)) == theirs
    count = raw("SELECT count(*) AS n FROM users WHERE subject = :subject")
    assert await Database(api.state["pool"], SYSTEM).row(count, subject=ada.subject) == {"n": 0}
    assert (await ada.get(TASKS)).json()["items"] == []
    me = (await ada.get(ME)).json()
    assert me["id"] != str(id)
    assert (me["name"], me["time_zone"], me["status"]) == ("Ada", None, "active")


async def test_concurrent_erasures_all_succeed(api: Api) -> None:
    ada = api.person()
    await create_data(ada)
    responses = await asyncio.gather(*(ada.delete(ME) for _ in range(5)))
    assert {response.status_code for response in responses} == {204}


async def test_an_erasure_does_not_end_a_concurrent_suspension(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The erasure passed authentication before the suspension. A new row would not be suspended."""
    ada = api.person()
    await ada.task()
    id = await id_of(ada)
    cached = api.state["users"]._cached[ada.subject].user
    await as_system(api, lifecycle.set_suspended, id, True)
    with monkeypatch.context() as patched:
        patched.setattr(api.state["users"], "resolve", lambda _: asyncio.sleep(0, cached))
        response = await ada.delete(ME)
    assert (response.status_code, response.json()["code"]) == (403, "account_suspended")
    api.state["users"].invalidate(ada.subject)
    assert (await ada.get(ME)).json()["code"] == "account_suspended"
    assert (await count_rows(api, id))["tasks"] == 1


async def test_the_audit_of_an_erasure_names_an_impersonator(api: Api) -> None:
    ada = api.person(impersonatedBy="root")
    id = await id_of(ada)
    await ada.delete(ME, headers={"X-Request-ID": "r1"})
    entries = raw("SELECT source, action, actor, user_id, details, request_id FROM audit_log WHERE subject = :subject")
    assert await Database(api.state["pool"], SYSTEM).rows(entries, subject=ada.subject) == [
        {
            "source": "self",
            "action": "erase",
            "actor": None,
            "user_id": id,
            "details": {"impersonated_by": "root"},
            "request_id": "r1",
        }
    ]


async def test_oauth_clients_and_api_keys_can_neither_export_nor_erase(api: Api) -> None:
    """Even with the scope `profile`."""
    ada = api.person()
    await create_data(ada)
    scope = "profile tasks:read tasks:write"
    access_token = api.issuer.access_token(sub=ada.subject, scope=scope, iss=BASE)
    for token in access_token, *api_key_tokens(ada, scope):
        bearer = {"Authorization": f"Bearer {token}"}
        assert (await ada.get(ME, headers=bearer)).status_code == 200
        for method, path in ("GET", EXPORT), ("DELETE", ME):
            response = await ada.request(method, path, headers=bearer)
            assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert (await ada.get(TASKS)).json()["items"]
