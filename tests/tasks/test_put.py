"""PUT /tasks/{id}: replace a task, or create it with an id chosen by the client and unique per owner."""

import asyncio
from uuid import uuid4

import pytest

from backend.database import SYSTEM, Database
from tests.conftest import Api
from tests.database.test_executor import raw

TASKS = "/api/v1/tasks"


async def test_put_creates_and_then_replaces(api: Api) -> None:
    ada = api.person()
    url = f"{TASKS}/{uuid4()}"
    created = await ada.put(url, {"title": "one", "description": "d", "status": "done", "priority": "urgent"})
    assert created.status_code == 201
    assert (created.headers["location"], created.headers["etag"]) == (url, '"1"')
    assert created.json()["completed_at"] == created.json()["created_at"]
    replaced = await ada.put(url, {"title": "two"})
    assert (replaced.status_code, replaced.headers["etag"]) == (200, '"2"')
    assert "location" not in replaced.headers
    defaults = {"title": "two", "description": None, "status": "todo", "priority": "normal", "completed_at": None}
    assert replaced.json() == created.json() | defaults | {"version": 2, "updated_at": replaced.json()["updated_at"]}
    assert (await ada.put(url, {"title": "two"})).json() == replaced.json()
    assert (await ada.get(url)).json() == replaced.json()


async def test_put_keeps_completed_at_of_a_done_task(api: Api) -> None:
    ada = api.person()
    task = await ada.task(status="done")
    again = (await ada.put(f"{TASKS}/{task['id']}", {"title": "another", "status": "done"})).json()
    assert (again["version"], again["completed_at"]) == (2, task["completed_at"])


@pytest.mark.parametrize(
    ("headers", "new", "existing"),
    [
        ({}, 201, 200),
        ({"If-None-Match": "*"}, 201, 412),
        ({"If-None-Match": '"1"'}, 201, 412),
        ({"If-None-Match": 'W/"1"'}, 201, 412),
        ({"If-None-Match": '"2", "3"'}, 201, 200),
        ({"If-None-Match": "1"}, 201, 200),
        ({"If-Match": "*"}, 404, 200),
        ({"If-Match": '"1"'}, 404, 200),
        ({"If-Match": '"2"'}, 404, 412),
        ({"If-Match": "*", "If-None-Match": "*"}, 404, 412),
        ({"If-Match": '"1"', "If-None-Match": '"2"'}, 404, 200),
    ],
    ids=lambda value: ", ".join(f"{name}: {tag}" for name, tag in value.items()) if isinstance(value, dict) else None,
)
async def test_put_evaluates_preconditions(api: Api, headers: dict[str, str], new: int, existing: int) -> None:
    ada = api.person()
    task = await ada.task()
    url = f"{TASKS}/{task['id']}"
    assert (await ada.put(f"{TASKS}/{uuid4()}", {"title": "x"}, headers=headers)).status_code == new
    response = await ada.put(url, {"title": "x"}, headers=headers)
    assert response.status_code == existing
    if existing == 412:
        assert response.json()["code"] == "stale_version"
        assert (await ada.get(url)).json() == task


async def test_an_id_of_another_user_is_like_an_unused_one(api: Api) -> None:
    ada, eve = api.person(), api.person()
    task = await ada.task("ada's")
    url = f"{TASKS}/{task['id']}"
    for person in eve, api.person():
        assert (await person.put(url, {"title": "x"}, headers={"If-Match": "*"})).status_code == 404
        assert (await person.put(url, {"title": "x"}, headers={"If-None-Match": "*"})).status_code == 201
    assert (await ada.get(url)).json() == task
    await eve.delete(url)
    assert (await ada.get(url)).json() == task


@pytest.mark.parametrize(
    "headers", [{}, {"If-Match": '"2"'}, {"If-None-Match": "*"}], ids=["unconditional", "If-Match", "If-None-Match"]
)
async def test_put_does_not_restore_a_task_in_the_trash(api: Api, headers: dict[str, str]) -> None:
    ada = api.person()
    task = await ada.task()
    url = f"{TASKS}/{task['id']}"
    await ada.delete(url)
    assert (await ada.put(url, {"title": "x"}, headers=headers)).status_code == 404
    assert (await ada.post(f"{url}/restore")).json()["title"] == task["title"]


async def test_put_creates_a_task_in_place_of_one_deleted_over_30_days_ago(api: Api) -> None:
    """Even if the purge has not run."""
    ada = api.person()
    task = await ada.task(status="done", description="old")
    url = f"{TASKS}/{task['id']}"
    await ada.delete(url)
    expire = raw("UPDATE tasks SET deleted_at = now() - interval '31 days' WHERE id = :id")
    await Database(api.state["pool"], SYSTEM).rows(expire, id=task["id"])
    assert (await ada.put(url, {"title": "x"}, headers={"If-Match": "*"})).status_code == 404
    created = await ada.put(url, {"title": "new", "status": "done"}, headers={"If-None-Match": "*"})
    assert created.status_code == 201
    new = created.json()
    assert (new["version"], new["description"], new["deleted_at"]) == (1, None, None)
    assert new["completed_at"] == new["created_at"] == new["updated_at"] > task["created_at"]


async def test_concurrent_puts_create_one_task(api: Api) -> None:
    ada = api.person()
    await ada.task()
    url = f"{TASKS}/{uuid4()}"
    responses = await asyncio.gather(*(ada.put(url, {"title": "x"}, headers={"If-None-Match": "*"}) for _ in range(20)))
    assert sorted(response.status_code for response in responses) == [201] + [412] * 19
    url = f"{TASKS}/{uuid4()}"
    responses = await asyncio.gather(*(ada.put(url, {"title": f"{number}"}) for number in range(20)))
    assert sorted(response.status_code for response in responses) == [200] * 19 + [201]
    assert sorted(response.json()["version"] for response in responses) == list(range(1, 21))
