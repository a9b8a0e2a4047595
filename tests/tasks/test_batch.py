"""A batch: all of it or nothing, and what cannot be is named."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.conftest import Api, Person

TASKS = "/api/v1/tasks"
BATCH = f"{TASKS}/batch"


async def titles(person: Person) -> list[str]:
    return [task["title"] for task in (await person.get(TASKS, params={"sort": "title"})).json()["items"]]


async def test_a_batch_does_all_in_order(api: Api) -> None:
    ada = api.person()
    old, gone = await ada.task("old", tags=["t"]), await ada.task("gone")
    id = str(uuid4())
    response = await ada.post(
        BATCH,
        {
            "operations": [
                {"op": "create", "task": {"title": "made", "tags": ["T", "u"]}},
                {"op": "create", "id": id, "task": {"title": "under an id"}},
                {"op": "update", "id": old["id"], "changes": {"title": "new", "tags": ["u"]}, "if_match": '"1"'},
                {"op": "update", "id": id, "changes": {"status": "done"}, "if_match": '"1"'},
                {"op": "update", "id": id, "changes": {}},
                {"op": "delete", "id": gone["id"], "if_match": "*"},
                {"op": "delete", "id": gone["id"]},
            ]
        },
    )
    assert response.status_code == 200
    items = response.json()["items"]
    assert [item and (item["title"], item["version"], item["tags"]) for item in items] == [
        ("made", 1, ["t", "u"]),
        ("under an id", 1, []),
        ("new", 2, ["u"]),
        ("under an id", 2, []),
        ("under an id", 2, []),
        None,
        None,
    ]
    assert await titles(ada) == ["made", "new", "under an id"]
    for item in items[0], items[2], items[4]:
        assert (await ada.get(f"{TASKS}/{item['id']}")).json() == item


@pytest.mark.parametrize(
    ("operation", "status", "code"),
    [
        ({"op": "update", "id": "{other}", "changes": {"title": "x"}}, 404, "not_found"),
        ({"op": "delete", "id": "{other}"}, 404, "not_found"),
        ({"op": "update", "id": "{own}", "changes": {"title": "x"}, "if_match": '"7"'}, 412, "stale_version"),
        ({"op": "update", "id": "{own}", "changes": {"title": "x"}, "if_match": "1"}, 412, "stale_version"),
        ({"op": "delete", "id": "{own}", "if_match": '"7"'}, 412, "stale_version"),
        ({"op": "create", "id": "{own}", "task": {"title": "x"}}, 412, "stale_version"),
        ({"op": "create", "id": "{bin}", "task": {"title": "x"}}, 404, "not_found"),
        ({"op": "update", "id": "{bin}", "changes": {"title": "x"}}, 404, "not_found"),
    ],
    ids=str,
)
async def test_one_that_cannot_be_undoes_all(api: Api, operation: dict[str, Any], status: int, code: str) -> None:
    ada, eve = api.person(), api.person()
    own, binned, other = await ada.task("own"), await ada.task("bin"), await eve.task("eve's")
    await ada.delete(f"{TASKS}/{binned['id']}")
    ids = {"{own}": own["id"], "{bin}": binned["id"], "{other}": other["id"]}
    operations = [
        {"op": "create", "task": {"title": "never", "tags": ["never"]}},
        operation | {"id": ids[operation["id"]]},
        {"op": "delete", "id": own["id"]},
    ]
    response = await ada.post(BATCH, {"operations": operations})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code)
    assert [(error["loc"], error["type"]) for error in problem["errors"]] == [(["body", "operations", 1], code)]
    assert (await ada.get(f"{TASKS}/{own['id']}")).json() == own
    assert (await ada.get("/api/v1/tags")).json() == {"items": []}
    assert (await titles(ada), await titles(eve)) == (["own"], ["eve's"])


@pytest.mark.parametrize(
    ("operation", "loc"),
    [
        ({"op": "create", "task": {"title": ""}}, ["create", "task", "title"]),
        ({"op": "create", "task": {"title": "x"}, "more": 1}, ["create", "more"]),
        ({"op": "update", "id": "none", "changes": {}}, ["update", "id"]),
        ({"op": "update", "changes": {}}, ["update", "id"]),
        ({"op": "delete", "id": str(UUID(int=7)), "if_match": 5}, ["delete", "if_match"]),
        ({"op": "destroy"}, []),
        ({}, []),
        (None, []),
    ],
    ids=str,
)
async def test_what_is_no_operation_is_named(api: Api, operation: Any, loc: list[str]) -> None:
    fine = {"op": "create", "task": {"title": "never"}}
    ada = api.person()
    response = await ada.post(BATCH, {"operations": [fine, operation]})
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["body", "operations", 1, *loc]
    assert await titles(ada) == []


@pytest.mark.parametrize(("count", "status"), [(0, 422), (1, 200), (100, 200), (101, 422)])
async def test_how_many(api: Api, count: int, status: int) -> None:
    ada = api.person()
    operations = [{"op": "create", "task": {"title": "x"}}] * count
    assert (await ada.post(BATCH, {"operations": operations})).status_code == status
    assert len((await ada.get(TASKS, params={"limit": 100})).json()["items"]) == (count if status == 200 else 0)


async def test_a_batch_may_be_long_and_a_task_may_not(api: Api) -> None:
    ada = api.person()
    long = {"op": "create", "task": {"title": "x", "description": "d" * 10_000}}
    assert (await ada.post(BATCH, {"operations": [long] * 100})).status_code == 200
    assert (await ada.post(BATCH, {"operations": [long], "x": "x" * 2**20})).status_code == 413
    assert (await ada.post(TASKS, {"title": "x", "description": "d" * 70_000})).status_code == 413


async def test_a_batch_is_done_once(api: Api) -> None:
    ada = api.person()
    body = {"operations": [{"op": "create", "task": {"title": "x"}}]}
    first, again = [await ada.post(BATCH, body, headers={"Idempotency-Key": "k"}) for _ in "12"]
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    refused = await ada.post(TASKS, {"title": "x"}, headers={"Idempotency-Key": "k"})
    assert refused.json()["code"] == "idempotency_key_reused"
    assert await titles(ada) == ["x"]


async def test_batches_that_cross_do_not_fail(api: Api) -> None:
    """Each writes the same tasks in another order, among others who give tags."""
    ada = api.person()
    ids = [(await ada.task(f"{number}"))["id"] for number in range(6)]
    orders = [ids, ids[::-1], ids[3:] + ids[:3]] * 3
    batches = [
        ada.post(BATCH, {"operations": [{"op": "update", "id": id, "changes": {"title": f"{n}"}} for id in order]})
        for n, order in enumerate(orders)
    ]
    patches = [ada.patch(f"{TASKS}/{id}", {"tags": ["a"]}) for id in ids]
    answers = await asyncio.gather(*batches, *patches)
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert len(set(await titles(ada))) == 1
