"""How many statements each operation runs: as many for one row as for many, and never more than is said here."""

from typing import Any
from uuid import uuid4

import pytest

from backend.database import Database, Statement, Transaction
from tests.conftest import Api

TASKS = "/api/v1/tasks"
TAGS = "/api/v1/tags"
KEY = {"Idempotency-Key": "k"}


@pytest.mark.parametrize(
    ("method", "path", "json", "headers", "statements"),
    [
        ("GET", TASKS, None, {}, 1),
        ("GET", f"{TASKS}?count=exact&tag=a&tag=b&q=x&sort=-due_at&overdue=true&priority=high", None, {}, 1),
        ("GET", f"{TASKS}?deleted=true", None, {}, 1),
        ("GET", f"{TASKS}/summary", None, {}, 2),
        ("POST", TASKS, {"title": "x"}, {}, 1),
        ("POST", TASKS, {"title": "x", "tags": ["a", "b", "c"]}, {}, 2),
        ("POST", TASKS, {"title": "x", "tags": ["a", "b", "c"]}, KEY, 5),
        ("POST", f"{TASKS}/batch", {"operations": [{"op": "create", "task": {"title": "x"}}] * 3}, {}, 4),
        ("GET", f"{TASKS}/{{task}}", None, {}, 1),
        ("GET", f"{TASKS}/{{task}}", None, {"If-None-Match": '"1"'}, 1),
        ("PUT", f"{TASKS}/{{task}}", {"title": "x", "tags": ["c"]}, {}, 2),
        ("PUT", f"{TASKS}/{{new}}", {"title": "x"}, {"If-None-Match": "*"}, 2),
        ("PATCH", f"{TASKS}/{{task}}", {"title": "x"}, {"If-Match": '"1"'}, 1),
        ("PATCH", f"{TASKS}/{{task}}", {"tags": ["x", "y"]}, {}, 2),
        ("PATCH", f"{TASKS}/{{task}}", {"title": "x"}, {"If-Match": '"7"'}, 2),
        ("PATCH", f"{TASKS}/{{new}}", {"title": "x"}, {}, 2),
        ("DELETE", f"{TASKS}/{{task}}", None, {}, 1),
        ("DELETE", f"{TASKS}/{{new}}", None, {}, 2),
        ("POST", f"{TASKS}/{{task}}/restore", None, {}, 1),
        ("GET", TAGS, None, {}, 1),
        ("POST", TAGS, {"name": "new"}, {}, 1),
        ("PATCH", f"{TAGS}/{{tag}}", {"name": "new"}, {}, 2),
        ("DELETE", f"{TAGS}/{{tag}}", None, {}, 2),
    ],
)
@pytest.mark.parametrize("rows", [1, 12])
async def test_the_number_of_statements_is_fixed(
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    json: Any,
    headers: dict[str, str],
    statements: int,
    rows: int,
) -> None:
    ada = api.person()
    tasks = [await ada.task(f"{number}", tags=["a", "b"]) for number in range(rows)]
    tags = (await ada.get(TAGS)).json()["items"]
    run: list[str] = []

    def counted(original: Any) -> Any:
        async def run_and_count(self: object, statement: Statement, *args: object, **values: object) -> Any:
            run.append(statement.sql)
            return await original(self, statement, *args, **values)

        return run_and_count

    monkeypatch.setattr(Database, "_rows", counted(Database._rows))
    monkeypatch.setattr(Transaction, "rows", counted(Transaction.rows))
    url = path.format(task=tasks[0]["id"], tag=tags[0]["id"], new=uuid4())
    response = await ada.request(method, url, json=json, headers=headers)
    assert response.status_code < 500
    assert len(run) == statements, run
