"""Idempotency-Key: sent again, answered again, done once; whoever else has an equal key."""

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


def key(value: str = "") -> dict[str, str]:
    return {"Idempotency-Key": value or uuid4().hex}


async def count(person: Person) -> int:
    total: int = (await person.get(TASKS, params={"count": "exact"})).json()["total"]
    return total


async def test_the_second_time_is_answered_as_the_first(api: Api) -> None:
    ada = api.person()
    headers = key()
    first = await ada.post(TASKS, {"title": "é🎉", "tags": ["a"], "priority": "high"}, headers=headers)
    assert first.status_code == 201
    assert "idempotency-replayed" not in first.headers
    await ada.patch(first.headers["location"], {"title": "changed meanwhile"})
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


async def test_another_body_under_the_same_key_is_refused(api: Api) -> None:
    ada = api.person()
    headers = key()
    await ada.post(TASKS, {"title": "one"}, headers=headers)
    other = await ada.post(TASKS, {"title": "two"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert await count(ada) == 1


async def test_an_equal_key_of_somebody_else_is_another_key(api: Api) -> None:
    headers = key()
    ids = set()
    for person in api.person(), api.person():
        answer = await person.post(TASKS, {"title": "x"}, headers=headers)
        assert "idempotency-replayed" not in answer.headers
        ids.add(answer.json()["id"])
        assert await count(person) == 1
    assert len(ids) == 2


async def test_of_twenty_at_once_one_is_done(api: Api) -> None:
    ada = api.person()
    await count(ada)
    headers = key()
    answers = await asyncio.gather(*(ada.post(TASKS, {"title": "x"}, headers=headers) for _ in range(20)))
    made = [answer for answer in answers if answer.status_code == 201]
    assert made
    assert len({answer.json()["id"] for answer in made}) == 1
    assert {answer.json()["code"] for answer in answers if answer not in made} <= {"idempotency_key_in_use"}
    assert await count(ada) == 1


async def test_while_the_first_is_at_work_the_second_is_told_so(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = api.person()
    await count(ada)
    headers = key()
    at_work, go_on = asyncio.Event(), asyncio.Event()
    rows = Transaction.rows

    async def slow(self: Transaction, statement: Statement, **values: Any) -> Any:
        if statement is idempotency.STORE:
            at_work.set()
            await go_on.wait()
        return await rows(self, statement, **values)

    monkeypatch.setattr(Transaction, "rows", slow)
    first = asyncio.create_task(ada.post(TASKS, {"title": "x"}, headers=headers))
    await at_work.wait()
    second = await ada.post(TASKS, {"title": "x"}, headers=headers)
    assert (second.status_code, second.json()["code"]) == (409, "idempotency_key_in_use")
    go_on.set()
    assert (await first).status_code == 201
    assert (await ada.post(TASKS, {"title": "x"}, headers=headers)).json() == (await first).json()


async def end_backend(api: Api, transaction: Transaction) -> None:
    """As when the server crashes, or the connection to it is lost."""
    pid = transaction._connection.info.backend_pid
    async with api.state["pool"].connection() as other:
        ended = await (await other.execute("SELECT pg_terminate_backend(%s, 10000) AS ended", (pid,))).fetchone()
    assert ended == {"ended": True}


@pytest.mark.parametrize("when", ["before the record", "before the commit"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TASKS, {"title": "x", "tags": ["t"]}),
        (f"{TASKS}/batch", {"operations": [{"op": "create", "task": {"title": "x", "tags": ["t"]}}]}),
    ],
    ids=["one", "batch"],
)
async def test_a_crash_between_work_and_record_leaves_neither(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], when: str
) -> None:
    ada = api.person()
    headers = key()
    rows = Transaction.rows

    async def crash(self: Transaction, statement: Statement, **values: Any) -> Any:
        if statement is not idempotency.STORE:
            return await rows(self, statement, **values)
        if when == "before the record":
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


async def test_a_refusal_is_not_kept(api: Api) -> None:
    ada = api.person()
    headers = key()
    assert (await ada.post(TASKS, {"title": ""}, headers=headers)).status_code == 422
    assert (await ada.post(TASKS, {"title": "x"}, headers=headers)).status_code == 201


async def test_after_a_day_the_key_is_free(api: Api) -> None:
    """Before the purge as after it."""
    ada = api.person()
    headers = key()
    database = Database(api.state["pool"], SYSTEM)
    age = raw("UPDATE idempotency_keys SET created_at = now() - CAST(:age AS interval) WHERE key = :key")
    there = raw("SELECT count(*) AS n FROM idempotency_keys WHERE key = :key")
    made = [await ada.post(TASKS, {"title": "x"}, headers=headers)]
    for age_of_it, new in ("23 hours 59 minutes", False), ("24 hours", True), ("25 hours", True):
        await database.rows(age, age=age_of_it, key=headers["Idempotency-Key"])
        if age_of_it == "25 hours":
            await purge(api.state["pool"])
            assert await database.row(there, key=headers["Idempotency-Key"]) == {"n": 0}
        made.append(await ada.post(TASKS, {"title": "x"}, headers=headers))
        assert ("idempotency-replayed" not in made[-1].headers) is new
    assert await count(ada) == len({answer.json()["id"] for answer in made}) == 3


@pytest.mark.parametrize(
    ("value", "status"),
    [("", 422), ("x" * 255, 201), ("x" * 256, 422), ("a b~!", 201), ("tab\there", 422), ("\u00e9", 422)],
    ids=lambda value: repr(value)[:20],
)
async def test_what_is_a_key(api: Api, value: str, status: int) -> None:
    ada = api.person()
    raw_headers = [
        (b"Authorization", ada.bearer["Authorization"].encode()),
        (b"Idempotency-Key", value.encode("latin-1")),
    ]
    response = await api.http.post(TASKS, json={"title": "x"}, headers=raw_headers)
    assert response.status_code == status
    if status == 422:
        assert response.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]
