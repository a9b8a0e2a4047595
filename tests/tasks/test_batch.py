"""POST /tasks/batch: all operations are applied, or none."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.conftest import Api, Person

TASKS = "/api/v1/tasks"
BATCH = f"{TASKS}/batch"


async def titles(person: Person) -> list[str]:
    return [task["title"] for task in (await person.get(TASKS, params={"sort": "title"})).json()["items"]]


async def test_operations_are_applied_in_order(api: Api) -> None:
    ada = api.person()
    existing, removed = await ada.task("existing", tags=["t"]), await ada.task("removed")
    id = str(uuid4())
    response = await ada.post(
        BATCH,
        {
            "operations": [
                {"op": "create", "task": {"title": "created", "tags": ["T", "u"]}},
                {"op": "create", "id": id, "task": {"title": "with an id"}},
                {"op": "update", "id": existing["id"], "changes": {"title": "new", "tags": ["u"]}, "if_match": '"1"'},
                {"op": "update", "id": id, "changes": {"status": "done"}, "if_match": '"1"'},
                {"op": "update", "id": id, "changes": {}},
                {"op": "delete", "id": removed["id"], "if_match": "*"},
                {"op": "delete", "id": removed["id"]},
            ]
        },
    )
    assert response.status_code == 200
    items = response.json()["items"]
    assert [item and (item["title"], item["version"], item["tags"]) for item in items] == [
        ("created", 1, ["t", "u"]),
        ("with an id", 1, []),
        ("new", 2, ["u"]),
        ("with an id", 2, []),
        ("with an id", 2, []),
        None,
        None,
    ]
    assert await titles(ada) == ["created", "new", "with an id"]
    for item in items[0], items[2], items[4]:
        assert (await ada.get(f"{TASKS}/{item['id']}")).json() == item


@pytest.mark.parametrize(
    ("operation", "task", "status", "code"),
    [
        pytest.param({"op": "update", "changes": {"title": "x"}}, "eve's", 404, "not_found", id="update of another's"),
        pytest.param({"op": "delete"}, "eve's", 404, "not_found", id="delete of another's"),
        pytest.param(
            {"op": "update", "changes": {"title": "x"}, "if_match": '"7"'},
            "own",
            412,
            "stale_version",
            id="stale update",
        ),
        pytest.param({"op": "delete", "if_match": '"7"'}, "own", 412, "stale_version", id="stale delete"),
        pytest.param({"op": "create", "task": {"title": "x"}}, "own", 412, "stale_version", id="id exists"),
        pytest.param({"op": "create", "task": {"title": "x"}}, "trash", 404, "not_found", id="id in the trash"),
    ],
)
async def test_a_failing_operation_is_named_and_nothing_is_applied(
    api: Api, operation: dict[str, Any], task: str, status: int, code: str
) -> None:
    ada, eve = api.person(), api.person()
    tasks = {"own": await ada.task("own"), "trash": await ada.task("trash"), "eve's": await eve.task("eve's")}
    await ada.delete(f"{TASKS}/{tasks['trash']['id']}")
    operations = [
        {"op": "create", "task": {"title": "never", "tags": ["never"]}},
        operation | {"id": tasks[task]["id"]},
        {"op": "delete", "id": tasks["own"]["id"]},
    ]
    response = await ada.post(BATCH, {"operations": operations})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code)
    assert [(error["loc"], error["type"]) for error in problem["errors"]] == [(["body", "operations", 1], code)]
    assert (await ada.get(f"{TASKS}/{tasks['own']['id']}")).json() == tasks["own"]
    assert (await ada.get("/api/v1/tags")).json() == {"items": []}
    assert (await titles(ada), await titles(eve)) == (["own"], ["eve's"])


@pytest.mark.parametrize(
    ("operation", "loc"),
    [
        pytest.param({"op": "create", "task": {"title": ""}}, ["create", "task", "title"], id="invalid task"),
        pytest.param({"op": "create", "task": {"title": "x"}, "more": 1}, ["create", "more"], id="unknown member"),
        pytest.param({"op": "update", "changes": {}}, ["update", "id"], id="no id"),
        pytest.param({"op": "delete", "id": str(UUID(int=7)), "if_match": 5}, ["delete", "if_match"], id="if_match"),
        pytest.param({"op": "destroy"}, [], id="unknown op"),
        pytest.param(None, [], id="null"),
    ],
)
async def test_an_invalid_operation_is_named(api: Api, operation: Any, loc: list[str]) -> None:
    valid = {"op": "create", "task": {"title": "never"}}
    ada = api.person()
    response = await ada.post(BATCH, {"operations": [valid, operation]})
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["body", "operations", 1, *loc]
    assert await titles(ada) == []


@pytest.mark.parametrize(("count", "status"), [(0, 422), (100, 200), (101, 422)])
async def test_a_batch_has_1_to_100_operations(api: Api, count: int, status: int) -> None:
    ada = api.person()
    operations = [{"op": "create", "task": {"title": "x"}}] * count
    assert (await ada.post(BATCH, {"operations": operations})).status_code == status
    assert len((await ada.get(TASKS, params={"limit": 100})).json()["items"]) == (count if status == 200 else 0)


async def test_a_batch_may_have_1_mib_and_a_task_64_kib(api: Api) -> None:
    ada = api.person()
    long = {"op": "create", "task": {"title": "x", "description": "d" * 10_000}}
    assert (await ada.post(BATCH, {"operations": [long] * 100})).status_code == 200
    assert (await ada.post(BATCH, {"operations": [long], "x": "x" * 2**20})).status_code == 413
    assert (await ada.post(TASKS, {"title": "x", "description": "d" * 70_000})).status_code == 413


async def test_a_batch_with_an_idempotency_key_is_applied_once(api: Api) -> None:
    ada = api.person()
    body = {"operations": [{"op": "create", "task": {"title": "x"}}]}
    first, again = [await ada.post(BATCH, body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    refused = await ada.post(TASKS, {"title": "x"}, headers={"Idempotency-Key": "k"})
    assert refused.json()["code"] == "idempotency_key_reused"
    assert await titles(ada) == ["x"]


async def test_concurrent_batches_in_different_orders_succeed(api: Api) -> None:
    """They update the same tasks while other requests set tags on these tasks."""
    ada = api.person()
    ids = [(await ada.task(f"{number}"))["id"] for number in range(6)]
    orders = [ids, ids[::-1], ids[3:] + ids[:3]] * 3
    batches = [
        ada.post(BATCH, {"operations": [{"op": "update", "id": id, "changes": {"title": f"{n}"}} for id in order]})
        for n, order in enumerate(orders)
    ]
    patches = [ada.patch(f"{TASKS}/{id}", {"tags": ["a"]}) for id in ids]
    responses = await asyncio.gather(*batches, *patches)
    assert [response.status_code for response in responses] == [200] * len(responses)
    assert len(set(await titles(ada))) == 1
