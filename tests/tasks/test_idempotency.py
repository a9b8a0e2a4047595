"""Idempotency-Key: a repeated request has one effect and gets the first response again."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from backend.database import SYSTEM, Database, Statement, Transaction
from backend.resources import idempotency
from backend.resources.retention import purge
from tests.conftest import Api, Person
from tests.database.test_executor import raw

TASKS = "/api/v1/tasks"


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid4().hex}


async def count(person: Person) -> int:
    total: int = (await person.get(TASKS, params={"count": "exact"})).json()["total"]
    return total


async def test_a_repeated_request_gets_the_first_response(api: Api) -> None:
    ada = api.person()
    headers = new_key()
    first = await ada.post(TASKS, {"title": "é🎉", "tags": ["a"], "priority": "high"}, headers=headers)
    assert first.status_code == 201
    assert "idempotency-replayed" not in first.headers
    await ada.patch(first.headers["location"], {"title": "changed in between"})
    again = await ada.request(
        "POST",
        TASKS,
        content=' {"priority":"high", "tags":["a"],"title":"\\u00e9\\ud83c\\udf89"}',
        headers={**headers, "Content-Type": "application/json"},
    )
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    for name in "etag", "location", "content-type", "content-length":
        assert again.headers[name] == first.headers[name]
    assert await count(ada) == 1


async def test_another_body_with_the_same_key_is_refused(api: Api) -> None:
    ada = api.person()
    headers = new_key()
    await ada.post(TASKS, {"title": "one"}, headers=headers)
    other = await ada.post(TASKS, {"title": "two"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert await count(ada) == 1


async def test_users_do_not_share_keys(api: Api) -> None:
    headers = new_key()
    ids = set()
    for person in api.person(), api.person():
        response = await person.post(TASKS, {"title": "x"}, headers=headers)
        assert "idempotency-replayed" not in response.headers
        ids.add(response.json()["id"])
        assert await count(person) == 1
    assert len(ids) == 2


async def test_concurrent_requests_with_one_key_create_one_task(api: Api) -> None:
    ada = api.person()
    await count(ada)
    headers = new_key()
    responses = await asyncio.gather(*(ada.post(TASKS, {"title": "x"}, headers=headers) for _ in range(20)))
    created = [response for response in responses if response.status_code == 201]
    assert created
    assert len({response.json()["id"] for response in created}) == 1
    assert {response.json()["code"] for response in responses if response not in created} <= {"idempotency_key_in_use"}
    assert await count(ada) == 1


async def test_a_request_whose_key_is_in_use_is_a_409(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = api.person()
    await count(ada)
    headers = new_key()
    storing, go_on = asyncio.Event(), asyncio.Event()
    rows = Transaction.rows

    async def slow(self: Transaction, statement: Statement, **values: Any) -> Any:
        if statement is idempotency.STORE:
            storing.set()
            await go_on.wait()
        return await rows(self, statement, **values)

    monkeypatch.setattr(Transaction, "rows", slow)
    first = asyncio.create_task(ada.post(TASKS, {"title": "x"}, headers=headers))
    await storing.wait()
    second = await ada.post(TASKS, {"title": "x"}, headers=headers)
    assert (second.status_code, second.json()["code"]) == (409, "idempotency_key_in_use")
    go_on.set()
    assert (await first).status_code == 201
    assert (await ada.post(TASKS, {"title": "x"}, headers=headers)).json() == (await first).json()


async def end_backend(api: Api, transaction: Transaction) -> None:
    """End the transaction's server process, as when the server crashes or the connection is lost."""
    pid = transaction._connection.info.backend_pid
    async with api.state["pool"].connection() as other:
        ended = await (await other.execute("SELECT pg_terminate_backend(%s, 10000) AS ended", (pid,))).fetchone()
    assert ended == {"ended": True}


@pytest.mark.parametrize("moment", ["before the response is stored", "before the commit"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TASKS, {"title": "x", "tags": ["t"]}),
        (f"{TASKS}/batch", {"operations": [{"op": "create", "task": {"title": "x", "tags": ["t"]}}]}),
    ],
    ids=["task", "batch"],
)
async def test_a_crash_leaves_neither_a_task_nor_a_stored_response(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], moment: str
) -> None:
    ada = api.person()
    headers = new_key()
    rows = Transaction.rows

    async def crash(self: Transaction, statement: Statement, **values: Any) -> Any:
        if statement is not idempotency.STORE:
            return await rows(self, statement, **values)
        if moment == "before the response is stored":
            await end_backend(api, self)
            return await rows(self, statement, **values)
        found = await rows(self, statement, **values)
        await end_backend(api, self)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "rows", crash)
        lost = await ada.post(path, body, headers=headers)
        assert (lost.status_code, lost.json()["code"]) == (503, "database_unavailable")
    assert await count(ada) == 0
    assert (await ada.get("/api/v1/tags")).json() == {"items": []}
    again = await ada.post(path, body, headers=headers)
    assert (again.status_code, again.headers.get("idempotency-replayed")) == (201 if path == TASKS else 200, None)
    assert await count(ada) == 1


async def test_a_failed_request_does_not_use_up_its_key(api: Api) -> None:
    ada = api.person()
    headers = new_key()
    assert (await ada.post(TASKS, {"title": ""}, headers=headers)).status_code == 422
    assert (await ada.post(TASKS, {"title": "x"}, headers=headers)).status_code == 201


async def test_a_key_expires_after_24_hours(api: Api) -> None:
    """Whether or not the purge has deleted it."""
    ada = api.person()
    headers = new_key()
    database = Database(api.state["pool"], SYSTEM)
    set_age = raw("UPDATE idempotency_keys SET created_at = now() - CAST(:age AS interval) WHERE key = :key")
    stored = raw("SELECT count(*) AS n FROM idempotency_keys WHERE key = :key")
    responses = [await ada.post(TASKS, {"title": "x"}, headers=headers)]
    for age, expired in ("23 hours 59 minutes", False), ("24 hours", True), ("25 hours", True):
        await database.rows(set_age, age=age, key=headers["Idempotency-Key"])
        if age == "25 hours":
            await purge(api.state["pool"])
            assert await database.row(stored, key=headers["Idempotency-Key"]) == {"n": 0}
        responses.append(await ada.post(TASKS, {"title": "x"}, headers=headers))
        assert ("idempotency-replayed" not in responses[-1].headers) is expired
    assert await count(ada) == len({response.json()["id"] for response in responses}) == 3


@pytest.mark.parametrize(
    ("value", "status"),
    [("", 422), ("x" * 255, 201), ("x" * 256, 422), ("a b~!", 201), ("tab\there", 422), ("\u00e9", 422)],
    ids=["empty", "255", "256", "punctuation", "tab", "not ASCII"],
)
async def test_a_key_has_1_to_255_printable_ascii_characters(api: Api, value: str, status: int) -> None:
    ada = api.person()
    raw_headers = [
        (b"Authorization", ada.bearer["Authorization"].encode()),
        (b"Idempotency-Key", value.encode("latin-1")),
    ]
    response = await api.http.post(TASKS, json={"title": "x"}, headers=raw_headers)
    assert response.status_code == status
    if status == 422:
        assert response.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]
