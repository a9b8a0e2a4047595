"""PUT: replaces what is there, or makes it under the client's own id, which is unique per owner."""

import asyncio
from uuid import uuid4

import pytest

from backend.database import SYSTEM, Database
from tests.conftest import Api
from tests.database.test_executor import raw

TASKS = "/api/v1/tasks"


async def test_put_makes_and_then_replaces(api: Api) -> None:
    ada = api.person()
    url = f"{TASKS}/{uuid4()}"
    made = await ada.put(url, {"title": "one", "description": "d", "status": "done", "priority": "urgent"})
    assert made.status_code == 201
    assert (made.headers["location"], made.headers["etag"]) == (url, '"1"')
    assert made.json()["completed_at"] == made.json()["created_at"]
    replaced = await ada.put(url, {"title": "two"})
    assert (replaced.status_code, replaced.headers["etag"]) == (200, '"2"')
    assert "location" not in replaced.headers
    defaults = {"title": "two", "description": None, "status": "todo", "priority": "normal", "completed_at": None}
    assert replaced.json() == made.json() | defaults | {"version": 2, "updated_at": replaced.json()["updated_at"]}
    assert (await ada.put(url, {"title": "two"})).json() == replaced.json(), "an equal one makes no new version"
    assert (await ada.get(url)).json() == replaced.json()


async def test_done_stays_done_since_the_first_time(api: Api) -> None:
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
        ({"If-Match": '"1"', "If-None-Match": '"1"'}, 404, 412),
        ({"If-Match": '"1"', "If-None-Match": '"2"'}, 404, 200),
    ],
    ids=str,
)
async def test_preconditions(api: Api, headers: dict[str, str], new: int, existing: int) -> None:
    ada = api.person()
    task = await ada.task()
    url = f"{TASKS}/{task['id']}"
    assert (await ada.put(f"{TASKS}/{uuid4()}", {"title": "x"}, headers=headers)).status_code == new
    response = await ada.put(url, {"title": "x"}, headers=headers)
    assert response.status_code == existing
    if existing == 412:
        assert response.json()["code"] == "stale_version"
        assert (await ada.get(url)).json() == task


async def test_an_id_tells_nothing_of_others(api: Api) -> None:
    """Whoever else uses it: the answer is the same, and nobody's task is touched."""
    ada, eve = api.person(), api.person()
    task = await ada.task("ada's")
    url = f"{TASKS}/{task['id']}"
    for person in eve, api.person():
        assert (await person.put(url, {"title": "x"}, headers={"If-Match": "*"})).status_code == 404
        assert (await person.put(url, {"title": "x"}, headers={"If-None-Match": "*"})).status_code == 201
    assert (await ada.get(url)).json() == task
    await eve.delete(url)
    assert (await ada.get(url)).json() == task


@pytest.mark.parametrize("headers", [{}, {"If-Match": '"2"'}, {"If-None-Match": "*"}], ids=str)
async def test_what_is_in_the_bin_stays_there(api: Api, headers: dict[str, str]) -> None:
    ada = api.person()
    task = await ada.task()
    url = f"{TASKS}/{task['id']}"
    await ada.delete(url)
    assert (await ada.put(url, {"title": "x"}, headers=headers)).status_code == 404
    assert (await ada.post(f"{url}/restore")).json()["title"] == task["title"]


async def test_what_has_left_the_bin_is_made_anew(api: Api) -> None:
    """Whether the purge has run cannot be seen."""
    ada = api.person()
    task = await ada.task(status="done", description="old")
    url = f"{TASKS}/{task['id']}"
    await ada.delete(url)
    expire = raw("UPDATE tasks SET deleted_at = now() - interval '31 days' WHERE id = :id")
    await Database(api.state["pool"], SYSTEM).rows(expire, id=task["id"])
    assert (await ada.put(url, {"title": "x"}, headers={"If-Match": "*"})).status_code == 404
    made = await ada.put(url, {"title": "new", "status": "done"}, headers={"If-None-Match": "*"})
    assert made.status_code == 201
    new = made.json()
    assert (new["version"], new["description"], new["deleted_at"]) == (1, None, None)
    assert new["completed_at"] == new["created_at"] == new["updated_at"] > task["created_at"]


async def test_twenty_at_once_make_one(api: Api) -> None:
    ada = api.person()
    await ada.task()
    url = f"{TASKS}/{uuid4()}"
    first = await asyncio.gather(*(ada.put(url, {"title": "x"}, headers={"If-None-Match": "*"}) for _ in range(20)))
    assert sorted(answer.status_code for answer in first) == [201] + [412] * 19
    url = f"{TASKS}/{uuid4()}"
    each = await asyncio.gather(*(ada.put(url, {"title": f"{number}"}) for number in range(20)))
    assert sorted(answer.status_code for answer in each) == [200] * 19 + [201]
    assert sorted(answer.json()["version"] for answer in each) == list(range(1, 21))
