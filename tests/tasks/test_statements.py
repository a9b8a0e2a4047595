"""The number of statements of each operation, which is independent of the number of rows, and their lane."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest

from backend.app import create_app
from backend.database import Database, Statement, Transaction
from tests.conftest import Api

TASKS = "/api/v1/tasks"
TAGS = "/api/v1/tags"
ME = "/api/v1/users/me"
KEY = {"Idempotency-Key": "k"}
STALE = {"If-Match": '"7"'}
EVERYTHING = "count=exact&tag=a&tag=b&q=x&sort=-due_at&overdue=true&priority=high&status=todo"


def batch(*operations: dict[str, Any]) -> dict[str, Any]:
    return {"operations": operations}


CREATE = {"op": "create", "task": {"title": "x"}}
CREATE_WITH_TAGS = {"op": "create", "task": {"title": "x", "tags": ["a", "new"]}}
CREATE_AS = {"op": "create", "id": "{new}", "task": {"title": "x"}}
UPDATE = {"op": "update", "id": "{task}", "changes": {"title": "x"}}
UPDATE_TAGS = {"op": "update", "id": "{task}", "changes": {"tags": ["b", "new"]}}
UPDATE_NOTHING = {"op": "update", "id": "{task}", "changes": {}}
DELETE = {"op": "delete", "id": "{task}"}
DELETE_AGAIN = {"op": "delete", "id": "{deleted}"}

# Method, path, body, headers, expected status, expected number of statements. `{task}` has tags; `{deleted}` is in the
# trash; `{new}` is an unused id.
CASES = [
    ("GET", TASKS, None, {}, 200, 1),
    ("GET", f"{TASKS}?{EVERYTHING}", None, {}, 200, 1),
    ("GET", f"{TASKS}?deleted=true", None, {}, 200, 1),
    ("GET", f"{TASKS}?cursor=nonsense", None, {}, 422, 0),
    ("GET", f"{TASKS}/summary", None, {}, 200, 2),
    ("GET", f"{TASKS}/changes", None, {}, 200, 1),
    ("GET", f"{TASKS}/changes?since=nonsense", None, {}, 422, 0),
    ("POST", TASKS, {"title": "x"}, {}, 201, 1),
    ("POST", TASKS, {"title": "x", "tags": ["a", "b", "new"]}, {}, 201, 2),
    ("POST", TASKS, {"title": "x"}, KEY, 201, 4),
    ("POST", TASKS, {"title": "x", "tags": ["a", "b", "new"]}, KEY, 201, 5),
    ("POST", TASKS, {"title": ""}, KEY, 422, 0),
    ("GET", f"{TASKS}/{{task}}", None, {}, 200, 1),
    ("GET", f"{TASKS}/{{task}}", None, {"If-None-Match": '"1"'}, 304, 1),
    ("GET", f"{TASKS}/{{deleted}}", None, {}, 404, 1),
    ("PUT", f"{TASKS}/{{task}}", {"title": "x", "tags": ["b", "new"]}, {}, 200, 2),
    ("PUT", f"{TASKS}/{{task}}", {"title": "x"}, {"If-Match": '"1"'}, 200, 2),
    ("PUT", f"{TASKS}/{{task}}", {"title": "x"}, STALE, 412, 3),
    ("PUT", f"{TASKS}/{{task}}", {"title": "x"}, {"If-None-Match": "*"}, 412, 3),
    ("PUT", f"{TASKS}/{{new}}", {"title": "x"}, {"If-None-Match": "*"}, 201, 2),
    ("PUT", f"{TASKS}/{{new}}", {"title": "x"}, STALE, 404, 3),
    ("PUT", f"{TASKS}/{{deleted}}", {"title": "x"}, {}, 404, 3),
    ("PATCH", f"{TASKS}/{{task}}", {"title": "x"}, {"If-Match": '"1"'}, 200, 1),
    ("PATCH", f"{TASKS}/{{task}}", {"tags": ["b", "new"]}, {}, 200, 2),
    ("PATCH", f"{TASKS}/{{task}}", {}, {}, 200, 1),
    ("PATCH", f"{TASKS}/{{task}}", {"title": "x"}, STALE, 412, 2),
    ("PATCH", f"{TASKS}/{{task}}", {"tags": ["b"]}, STALE, 412, 3),
    ("PATCH", f"{TASKS}/{{new}}", {"title": "x"}, {}, 404, 2),
    ("DELETE", f"{TASKS}/{{task}}", None, {}, 204, 1),
    ("DELETE", f"{TASKS}/{{task}}", None, STALE, 412, 2),
    ("DELETE", f"{TASKS}/{{deleted}}", None, {}, 204, 2),
    ("DELETE", f"{TASKS}/{{new}}", None, {}, 404, 2),
    ("POST", f"{TASKS}/{{deleted}}/restore", None, {}, 200, 1),
    ("POST", f"{TASKS}/{{task}}/restore", None, {}, 200, 1),
    ("POST", f"{TASKS}/{{task}}/restore", None, STALE, 412, 2),
    ("POST", f"{TASKS}/{{new}}/restore", None, {}, 404, 2),
    # A batch runs one for each operation, and one for the advisory lock.
    ("POST", f"{TASKS}/batch", batch(CREATE, CREATE, CREATE), {}, 200, 1 + 3),
    ("POST", f"{TASKS}/batch", batch(UPDATE, UPDATE, UPDATE), {}, 200, 1 + 3),
    ("POST", f"{TASKS}/batch", batch(DELETE), {}, 200, 1 + 1),
    ("POST", f"{TASKS}/batch", batch(DELETE_AGAIN), {}, 200, 1 + 2),
    # Operations that write tags take the lock again, which the transaction already holds.
    ("POST", f"{TASKS}/batch", batch(CREATE_WITH_TAGS, CREATE_AS, UPDATE_TAGS), {}, 200, 1 + 3 * 2),
    ("POST", f"{TASKS}/batch", batch(CREATE, UPDATE, UPDATE_TAGS, UPDATE_NOTHING, DELETE), {}, 200, 1 + 4 + 2),
    ("POST", f"{TASKS}/batch", batch(CREATE, UPDATE, DELETE), KEY, 200, 3 + 1 + 3),
    ("POST", f"{TASKS}/batch", batch(CREATE, UPDATE | {"if_match": '"7"'}, DELETE), {}, 412, 1 + 1 + 2),
    ("GET", TAGS, None, {}, 200, 1),
    ("POST", TAGS, {"name": "new"}, {}, 201, 2),
    ("POST", TAGS, {"name": "A"}, {}, 409, 2),
    ("PATCH", f"{TAGS}/{{tag}}", {"name": "new"}, {}, 200, 2),
    ("PATCH", f"{TAGS}/{{tag}}", {}, {}, 200, 1),
    ("DELETE", f"{TAGS}/{{tag}}", None, {}, 204, 2),
    ("DELETE", f"{TAGS}/{{new}}", None, {}, 404, 2),
    ("GET", ME, None, {}, 200, 1),
    ("PATCH", ME, {"locale": "de"}, {}, 200, 1),
    ("PATCH", ME, {}, {}, 200, 1),
    ("GET", TASKS, None, {"Authorization": "Bearer nonsense"}, 401, 0),
    ("POST", TASKS, None, {}, 422, 0),
]
IDS = [f"{case[0]} {case[1].removeprefix('/api/v1/')} {case[4]}" for case in CASES]
ROWS = 12


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the statements that run."""
    run: list[str] = []

    def counted(original: Any) -> Any:
        async def run_and_count(self: object, statement: Statement, *args: object, **values: object) -> Any:
            run.append(statement.sql)
            return await original(self, statement, *args, **values)

        return run_and_count

    with monkeypatch.context() as patched:
        patched.setattr(Database, "_rows", counted(Database._rows))
        patched.setattr(Transaction, "rows", counted(Transaction.rows))
        yield run


def filled(value: Any, names: dict[str, str]) -> Any:
    """`value` with the placeholders of all its strings replaced."""
    match value:
        case str():
            return value.format(**names)
        case dict():
            return {name: filled(inner, names) for name, inner in value.items()}
        case list() | tuple():
            return [filled(inner, names) for inner in value]
    return value


@pytest.mark.parametrize(("method", "path", "json", "headers", "status", "expected"), CASES, ids=IDS)
async def test_an_operation_runs_a_fixed_number_of_statements(
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    json: Any,
    headers: dict[str, str],
    status: int,
    expected: int,
) -> None:
    ada = api.person()
    tasks = [{"op": "create", "task": {"title": "x", "tags": ["a", "b"]}}] * ROWS
    created = await ada.post(f"{TASKS}/batch", batch(*tasks))
    deleted = await ada.task()
    await ada.delete(f"{TASKS}/{deleted['id']}")
    (tag, *_) = (await ada.get(TAGS)).json()["items"]
    names = {"task": created.json()["items"][0]["id"], "deleted": deleted["id"], "tag": tag["id"], "new": str(uuid4())}
    with counting(monkeypatch) as run:
        response = await ada.request(method, filled(path, names), json=filled(json, names), headers=headers)
    assert response.status_code == status, response.text
    assert len(run) == expected, run


@pytest.mark.parametrize(
    ("path", "json"), [(TASKS, {"title": "x"}), (f"{TASKS}/batch", batch(CREATE, CREATE))], ids=["task", "batch"]
)
async def test_a_stored_response_is_returned_in_two_statements(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, json: Any
) -> None:
    """One locks the key, one reads the response. A key that was used for another request takes as many."""
    ada = api.person()
    first = await ada.post(path, json, headers=KEY)
    with counting(monkeypatch) as run:
        again = await ada.post(path, json, headers=KEY)
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
    assert len(run) == 2, run
    with counting(monkeypatch) as run:
        other = await ada.post(TASKS, {"title": "other"}, headers=KEY)
    assert other.json()["code"] == "idempotency_key_reused"
    assert len(run) == 2, run


async def test_only_the_first_request_loads_the_user_row(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = api.person()
    with counting(monkeypatch) as run:
        await ada.get(TASKS)
    assert len(run) == 2 + 1, run
    with counting(monkeypatch) as run:
        await ada.get(TASKS)
    assert len(run) == 1, run


@pytest.mark.parametrize(
    ("path", "is_long"),
    [
        (TASKS, False),
        (f"{TASKS}?sort=-due_at&limit=2", False),
        (f"{TASKS}?q=x", True),
        (f"{TASKS}?count=exact", True),
        (f"{TASKS}?deleted=true", True),
        (f"{TASKS}/{{id}}", False),
        (f"{TASKS}/summary", True),
        (f"{TASKS}/changes", True),
        (f"{TASKS}/changes?limit=1&since={{first}}", True),
        (f"{TASKS}/changes?since={{last}}", False),
        (TAGS, True),
        (ME, False),
        (f"{ME}/export", True),
        ("/api/v1/admin/users", False),
        ("/api/v1/admin/users?q=x", True),
        ("/api/v1/admin/users?status=suspended", True),
        ("/api/v1/admin/audit?user_id=019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f", False),
    ],
)
async def test_only_long_statements_run_in_the_long_lane(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, is_long: bool
) -> None:
    ada, long, lanes = api.person(role="admin"), [], api.state["pool"].lanes
    tasks = [await ada.task(f"task {number}", tags=["a"]) for number in range(3)]
    first = (await ada.get(f"{TASKS}/changes", params={"limit": 1})).json()["next"]
    last = (await ada.get(f"{TASKS}/changes")).json()["next"]
    search = lanes.search

    async def noted(*statement: Any) -> Any:
        long.append(statement)
        return await search(*statement)

    monkeypatch.setattr(lanes, "search", noted)
    response = await ada.get(path.format(id=tasks[0]["id"], first=first, last=last))
    assert response.status_code == 200, response.text
    assert bool(long) is is_long


def test_every_operation_of_tasks_and_tags_is_counted() -> None:
    """Except streams, which run statements until they end."""
    documented = {
        (method.upper(), path)
        for path, operations in create_app().openapi()["paths"].items()
        for method, operation in operations.items()
        if path.startswith((TASKS, TAGS))
        if not any("text/event-stream" in response.get("content", {}) for response in operation["responses"].values())
    }
    counted = {(case[0], re.sub(r"\{\w+\}", "{id}", case[1].partition("?")[0])) for case in CASES}
    assert documented <= counted
