"""The bin: out of it again, gone after 30 days for every route at once, and purged by whichever worker comes first."""

import asyncio
import logging
from typing import Any
from uuid import uuid4

import pytest

from backend.database import SYSTEM, Database, Pool
from backend.tasks import purge as purge_module
from backend.tasks.purge import LOCK, purge, purging
from tests.conftest import Api, Person
from tests.test_database import raw

TASKS = "/api/v1/tasks"
COUNT = raw("SELECT count(*) AS n FROM tasks WHERE id = ANY(CAST(:ids AS uuid[]))")
AGE = raw("UPDATE tasks SET deleted_at = now() - CAST(:age AS interval) WHERE id = ANY(CAST(:ids AS uuid[]))")


async def deleted(api: Api, person: Person, age: str, count: int = 1) -> list[dict[str, Any]]:
    """Tasks that were deleted this long ago."""
    tasks = [await person.task(f"{number}") for number in range(count)]
    for task in tasks:
        await person.delete(f"{TASKS}/{task['id']}")
    await Database(api.state["pool"], SYSTEM).rows(AGE, age=age, ids=[task["id"] for task in tasks])
    return tasks


async def remaining(api: Api, tasks: list[dict[str, Any]]) -> int:
    row = await Database(api.state["pool"], SYSTEM).row(COUNT, ids=[task["id"] for task in tasks])
    assert row
    count: int = row["n"]
    return count


async def test_restore_brings_the_task_back_as_it_was(api: Api) -> None:
    ada = api.person()
    task = await ada.task(status="done", description="d")
    url = f"{TASKS}/{task['id']}"
    await ada.delete(url)
    restored = await ada.post(f"{url}/restore")
    assert restored.status_code == 200
    assert restored.headers["etag"] == '"3"'
    body = restored.json()
    assert body == task | {"version": 3, "updated_at": body["updated_at"]}
    assert body["updated_at"] > task["updated_at"]
    assert (await ada.post(f"{url}/restore")).json() == body == (await ada.get(url)).json()


async def test_restore_heeds_if_match(api: Api) -> None:
    ada = api.person()
    (task,) = await deleted(api, ada, "29 days")
    url = f"{TASKS}/{task['id']}/restore"
    stale = await ada.post(url, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "stale_version")
    assert (await ada.post(url, headers={"If-Match": '"2"'})).status_code == 200
    assert (await ada.post(url, headers={"If-Match": '"2"'})).status_code == 412, "when it is back, too"


async def test_of_what_is_not_there_no_version_is_asked(api: Api) -> None:
    """Not for restore, either: an id that is unknown, somebody else's, or past its time is a 404 before it is a 412."""
    ada = api.person()
    others, (past,) = await api.person().task(), await deleted(api, ada, "31 days")
    for id in uuid4(), others["id"], past["id"]:
        for method, end in ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/restore"):
            for if_match in '"7"', "*":
                body = {"title": "x"} if method == "PATCH" else None
                answer = await ada.request(method, f"{TASKS}/{id}{end}", json=body, headers={"If-Match": if_match})
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        for operation in {"op": "update", "changes": {"title": "x"}}, {"op": "delete"}:
            batch = {"operations": [{**operation, "id": f"{id}", "if_match": '"7"'}]}
            assert (await ada.post(f"{TASKS}/batch", batch)).status_code == 404


@pytest.mark.parametrize(("age", "there"), [("29 days 23:59", True), ("30 days 00:00:01", False)])
async def test_after_thirty_days_it_is_gone_for_every_route(api: Api, age: str, there: bool) -> None:
    """Before any purge: nobody can tell whether it has run."""
    ada = api.person()
    (task,) = await deleted(api, ada, age)
    url = f"{TASKS}/{task['id']}"
    assert len((await ada.get(TASKS, params={"deleted": "true"})).json()["items"]) == there
    for method in "GET", "PATCH", "PUT":
        if method == "PUT" and not there:
            continue  # it makes a new one, see test_put.py
        body = {"title": "x"} if method != "GET" else None
        assert (await ada.request(method, url, json=body)).status_code == 404
    assert (await ada.delete(url)).status_code == (204 if there else 404)
    assert (await ada.post(f"{url}/restore")).status_code == (200 if there else 404)
    assert await remaining(api, [task]) == 1


async def test_the_purge_takes_what_has_expired_and_nothing_else(api: Api) -> None:
    ada = api.person()
    old = await deleted(api, ada, "30 days 1 second", count=3)
    kept = [await ada.task(), *await deleted(api, ada, "29 days 23 hours")]
    assert await purge(api.state["pool"]) >= 3
    assert (await remaining(api, old), await remaining(api, kept)) == (0, 2)
    assert await purge(api.state["pool"]) == 0


@pytest.mark.parametrize(
    ("note", "left"),
    [
        (
            "INSERT INTO security_events (issuer, jti, received_at)"
            " VALUES (:of, :age, now() - cast(cast(:age AS text) AS interval))",
            "SELECT jti AS age FROM security_events WHERE issuer = :of",
        ),
        (
            "INSERT INTO erasures (issuer, subject, roles, erased_at)"
            " VALUES (:of, :age, '{}', now() - cast(cast(:age AS text) AS interval))",
            "SELECT subject AS age FROM erasures WHERE issuer = :of",
        ),
    ],
    ids=["events", "erasures"],
)
async def test_what_was_noted_of_people_goes_after_30_days(api: Api, note: str, left: str) -> None:
    system, of = Database(api.state["pool"], SYSTEM), uuid4().hex
    for age in "29 days 23 hours", "30 days 1 second":
        await system.rows(raw(note), of=of, age=age)
    assert await purge(api.state["pool"]) >= 1
    assert await system.rows(raw(left), of=of) == [{"age": "29 days 23 hours"}]


async def test_several_workers_purge_each_task_once(api: Api, database_url: str) -> None:
    await purge(api.state["pool"])
    old = await deleted(api, api.person(), "31 days", count=20)
    async with Pool(database_url, size=5) as pool:
        assert sum(await asyncio.gather(*(purge(pool) for _ in range(5)))) == 20
    assert await remaining(api, old) == 0


async def test_whoever_comes_second_leaves_it_to_the_first(api: Api) -> None:
    old = await deleted(api, api.person(), "31 days")

    async def first(transaction: Any) -> None:
        assert await transaction.row(LOCK) == {"ours": True}
        assert await purge(api.state["pool"]) == 0
        assert await remaining(api, old) == 1

    await Database(api.state["pool"], SYSTEM).transact(first)
    assert await purge(api.state["pool"]) >= 1


async def test_the_purge_goes_on_after_a_failure(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First against a server that is not there, then against the real one; the third time it waits for good."""
    caplog.set_level(logging.INFO, purge_module.__name__)
    old = await deleted(api, api.person(), "31 days", count=5)
    pools = iter([Pool("postgresql://nobody@127.0.0.1:9/nothing", size=3, wait=0.05), api.state["pool"]])
    done = asyncio.Event()
    rounds = 0

    async def wait() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            done.set()
            await asyncio.Event().wait()

    async def from_the_next_pool(_: Pool) -> int:
        return await purge(next(pools))

    monkeypatch.setattr(purge_module, "purge", from_the_next_pool)
    async with purging(api.state["pool"], wait):
        await done.wait()
    assert await remaining(api, old) == 0
    assert [record.levelname for record in caplog.records if record.name == purge_module.__name__] == [
        "WARNING",
        "INFO",
    ]
