"""Tasks: creation, JSON, updates, conditional requests, validation."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from backend.database import SYSTEM, Database
from backend.tasks.schemas import TaskRead
from tests.conftest import Api
from tests.database.test_executor import raw

TASKS = "/api/v1/tasks"
YESTERDAY = (datetime.now(UTC) - timedelta(days=1)).isoformat()


async def test_a_task_can_be_created_completed_reopened_and_deleted(api: Api) -> None:
    ada = api.person()
    created = await ada.post(TASKS, {"title": "Buy milk", "due_at": YESTERDAY})
    assert created.status_code == 201
    task = created.json()
    assert list(task) == list(TaskRead.model_fields)
    assert created.headers["location"] == f"{TASKS}/{task['id']}"
    assert created.headers["etag"] == '"1o"'
    assert (task["is_overdue"], task["status"], task["priority"], task["version"]) == (True, "todo", "normal", 1)

    url = created.headers["location"]
    assert (await ada.get(url)).json() == task

    done = await ada.patch(url, {"status": "done"}, headers={"If-Match": '"1o"'})
    assert done.status_code == 200
    assert done.headers["etag"] == '"2"'
    assert done.json()["completed_at"] == done.json()["updated_at"] > task["updated_at"]
    assert not done.json()["is_overdue"]

    reopened = (await ada.patch(url, {"status": "in_progress"})).json()
    assert (reopened["completed_at"], reopened["is_overdue"], reopened["version"]) == (None, True, 3)

    for _ in range(2):
        deleted = await ada.delete(url)
        assert (deleted.status_code, deleted.content) == (204, b"")
        assert "content-type" not in deleted.headers
    for method in "GET", "PATCH":
        assert (await ada.request(method, url, json={"title": "x"} if method == "PATCH" else None)).status_code == 404
    assert (await ada.get(TASKS)).json() == {"items": [], "next_cursor": None}


async def test_responses_equal_the_json_of_the_response_model(api: Api) -> None:
    """Byte by byte, for one task and for a list."""
    ada = api.person()
    controls = "".join(map(chr, range(1, 32)))
    tasks: list[dict[str, Any]] = [
        {"title": 'é🎉\t"quoted" \\ and \u2028 / \x7f', "description": "", "due_at": "2030-02-03T04:05:06.789+02:00"},
        {"title": "at 10+00:00", "description": f".000000Z{controls}", "tags": ["b", 'a"', "\\", "{,}", "null", "é"]},
        {"title": "null", "status": "done", "priority": "urgent"},
        {"title": "first", "due_at": "0001-01-01T00:00:00Z"},
        {"title": "last", "due_at": "9999-12-31T23:59:59.999999Z"},
        {"title": "half", "due_at": "2030-01-01T00:00:00.5Z"},
        {"title": "least", "due_at": "2030-01-01T00:00:00.000001Z"},
    ]
    for members in tasks:
        await ada.post(TASKS, members)
    for query, rest in ("", ',"next_cursor":null}'), ("count=exact", ',"next_cursor":null,"total":7}'):
        page = await ada.get(f"{TASKS}?{query}")
        responses = [await ada.get(f"{TASKS}/{task['id']}") for task in page.json()["items"]]
        assert len(responses) == len(tasks)
        assert page.text == '{"items":[' + ",".join(response.text for response in responses) + "]" + rest
        for response in responses:
            assert response.content == TaskRead.model_validate_json(response.content).model_dump_json().encode()


@pytest.mark.parametrize(
    ("patch", "changed"),
    [
        pytest.param({}, False, id="empty"),
        pytest.param({"title": "a task"}, False, id="equal"),
        pytest.param({"description": None, "due_at": None, "status": None, "priority": None}, False, id="defaults"),
        pytest.param({"title": "a task", "priority": "low"}, True, id="one of two changed"),
        pytest.param({"due_at": "2030-01-01T00:00:00Z"}, True, id="due date"),
    ],
)
async def test_only_a_changed_value_creates_a_version(api: Api, patch: dict[str, Any], changed: bool) -> None:
    ada = api.person()
    task = await ada.task()
    after = (await ada.patch(f"{TASKS}/{task['id']}", patch)).json()
    assert after["version"] == task["version"] + changed
    assert (after["updated_at"] > task["updated_at"]) is changed
    assert {name: after[name] for name in patch} == {
        name: task[name] if value is None else value for name, value in patch.items()
    }


async def test_null_resets_a_member_to_its_default(api: Api) -> None:
    ada = api.person()
    task = await ada.task(description="d", status="done", priority="urgent", due_at="2030-01-01T00:00:00Z")
    patch = dict.fromkeys(("description", "status", "priority", "due_at"))
    after = (await ada.patch(f"{TASKS}/{task['id']}", patch)).json()
    assert {name: after[name] for name in patch} == {
        "description": None,
        "status": "todo",
        "priority": "normal",
        "due_at": None,
    }
    assert (await ada.patch(f"{TASKS}/{task['id']}", {"title": None})).status_code == 422


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ('"1"', 200),
        ('"1o"', 200),
        ("*", 200),
        ('"7", "1"', 200),
        ('"2"', 412),
        ('W/"1"', 412),
        ('"01"', 412),
        ('"1x"', 412),
        ("1", 412),
        ("", 412),
        ('"99999999999999999999"', 412),
    ],
)
async def test_if_match_compares_versions_strongly(api: Api, header: str, status: int) -> None:
    """RFC 9110, section 13.1.1."""
    ada = api.person()
    task = await ada.task()
    url = f"{TASKS}/{task['id']}"
    response = await ada.patch(url, {"title": "new"}, headers={"If-Match": header})
    assert response.status_code == status
    if status == 412:
        assert response.json()["code"] == "stale_version"
        assert (await ada.get(url)).json() == task


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
async def test_every_write_checks_if_match(api: Api, method: str) -> None:
    ada = api.person()
    task = await ada.task()
    body = {"title": "new"} if method != "DELETE" else None
    for id, header, status in (
        (uuid4(), '"1"', 404),
        (task["id"], '"2"', 412),
        (task["id"], '"1"', 204 if method == "DELETE" else 200),
    ):
        response = await ada.request(method, f"{TASKS}/{id}", headers={"If-Match": header}, json=body)
        assert response.status_code == status


async def test_an_empty_patch_checks_if_match(api: Api) -> None:
    ada = api.person()
    task = await ada.task()
    assert (await ada.patch(f"{TASKS}/{task['id']}", {}, headers={"If-Match": '"2"'})).status_code == 412


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ('"1"', 304),
        ('"9";"1"', 304),
        ('"1o"', 200),
        ("", 200),
        ("1", 200),
    ],
    ids=["equal", "two header lines", "tag while overdue", "empty", "unquoted"],
)
async def test_a_get_evaluates_if_none_match(api: Api, header: str, status: int) -> None:
    ada = api.person()
    task = await ada.task()
    lines = [("If-None-Match", line) for line in header.split(";")]
    response = await api.http.get(f"{TASKS}/{task['id']}", headers=[*ada.bearer.items(), *lines])
    assert response.status_code == status
    assert response.headers["etag"] == '"1"'
    assert response.headers["cache-control"] == "private, no-cache"
    assert response.content == b"" if status == 304 else response.json() == task


@pytest.mark.parametrize(
    ("body", "loc", "type"),
    [
        pytest.param({}, ["body", "title"], "missing", id="empty object"),
        pytest.param({"title": ""}, ["body", "title"], "string_too_short", id="empty title"),
        pytest.param({"title": " \u2003\t"}, ["body", "title"], "value_error", id="blank title"),
        pytest.param({"title": "\u200b\ufeff\u3164"}, ["body", "title"], "value_error", id="invisible title"),
        pytest.param({"title": "x" * 201}, ["body", "title"], "string_too_long", id="long title"),
        pytest.param({"title": 5}, ["body", "title"], "string_type", id="numeric title"),
        pytest.param(
            {"title": "x", "description": "\0"}, ["body", "description"], "value_error", id="NUL in description"
        ),
        pytest.param(
            {"title": "x", "description": "x" * 10_001},
            ["body", "description"],
            "string_too_long",
            id="long description",
        ),
        pytest.param({"title": "x", "status": "maybe"}, ["body", "status"], "enum", id="unknown status"),
        pytest.param(
            {"title": "x", "due_at": "2030-01-01T00:00:00"}, ["body", "due_at"], "value_error", id="time without offset"
        ),
        pytest.param({"title": "x", "due_at": 1700000000}, ["body", "due_at"], None, id="numeric time"),
        pytest.param({"title": "x", "due_at": "1700000000"}, ["body", "due_at"], None, id="digits as a time"),
        pytest.param({"title": "x", "due_at": "2030-02-30T00:00:00Z"}, ["body", "due_at"], None, id="February 30"),
        pytest.param({"title": "x", "due_at": "9999-12-31T23:59:59-14:00"}, ["body", "due_at"], None, id="year 10000"),
        pytest.param({"title": "x", "due_at": "0001-01-01T00:00:00+14:00"}, ["body", "due_at"], None, id="year 0"),
        pytest.param([], ["body"], None, id="array"),
        pytest.param(None, ["body"], None, id="null"),
    ],
)
async def test_an_invalid_task_is_a_422(api: Api, body: Any, loc: list[str], type: str | None) -> None:
    ada = api.person()
    response = await ada.request("POST", TASKS, json=body)
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "invalid"
    assert problem["errors"][0]["loc"] == loc
    assert type is None or problem["errors"][0]["type"] == type
    assert (await ada.get(TASKS)).json()["items"] == []


async def test_times_are_returned_in_utc_with_microseconds(api: Api) -> None:
    ada = api.person()
    for sent, returned in {
        "2030-02-03T04:05:06.789123+02:00": "2030-02-03T02:05:06.789123Z",
        "9999-12-31T23:59:59Z": "9999-12-31T23:59:59Z",
        "0001-01-01T00:00:00Z": "0001-01-01T00:00:00Z",
    }.items():
        assert (await ada.task(due_at=sent))["due_at"] == returned
    assert len((await ada.get(TASKS)).json()["items"]) == 3


async def test_an_update_and_a_deletion_count_as_versions(api: Api) -> None:
    ada = api.person()
    task = await ada.task(status="done")
    url = f"{TASKS}/{task['id']}"
    updated = (await ada.patch(url, {"status": "done", "title": "b"})).json()
    assert updated["completed_at"] == task["completed_at"]
    assert (await ada.delete(url)).status_code == 204
    statement = raw("SELECT version, deleted_at = updated_at AS same FROM tasks WHERE id = :id")
    assert await Database(api.state["pool"], SYSTEM).row(statement, id=task["id"]) == {"version": 3, "same": True}


async def test_concurrent_patches_each_create_a_version(api: Api) -> None:
    ada = api.person()
    task = await ada.task()
    url = f"{TASKS}/{task['id']}"
    responses = await asyncio.gather(*(ada.patch(url, {"title": f"{number}"}) for number in range(40)))
    versions = sorted((response.json()["version"], response.json()["updated_at"]) for response in responses)
    assert [version for version, _ in versions] == list(range(2, 42))
    assert [moment for _, moment in versions] == sorted(moment for _, moment in versions)


@pytest.mark.parametrize(
    ("scope", "method", "status"),
    [
        ("tasks:read", "POST", 403),
        ("tasks:write", "GET", 403),
        ("tasks", "GET", 403),
        ("profile tasks:read tasks:write", "POST", 201),
    ],
)
async def test_an_oauth_access_token_needs_the_scope(api: Api, scope: str, method: str, status: int) -> None:
    token = api.issuer.access_token(sub=uuid4().hex, scope=scope)
    body = {"title": "x"} if method == "POST" else None
    response = await api.http.request(method, TASKS, json=body, headers={"Authorization": f"Bearer {token}"})
    assert response.status_code == status
    if status == 403:
        assert response.json()["code"] == "insufficient_scope"
        assert f'scope="tasks:{"read" if method == "GET" else "write"}"' in response.headers["www-authenticate"]


@pytest.mark.parametrize("id", ["1", "00000000-0000-0000-0000-00000000000g", "%00", "..%2f.."])
async def test_an_invalid_id_is_a_404(api: Api, id: str) -> None:
    for method in "GET", "PATCH", "DELETE":
        response = await api.person().request(method, f"{TASKS}/{id}")
        assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def test_patch_accepts_json_and_merge_patch(api: Api) -> None:
    ada = api.person()
    task = await ada.task()
    url = f"{TASKS}/{task['id']}"
    for kind, status in {
        "application/merge-patch+json": 200,
        "application/json; charset=utf-8": 200,
        "Application/JSON": 200,
        "application/json-patch+json": 415,
    }.items():
        response = await ada.request("PATCH", url, content=b'{"title":"t"}', headers={"Content-Type": kind})
        assert response.status_code == status, kind
    response = await ada.request(
        "POST", TASKS, content=b'{"title":"t"}', headers={"Content-Type": "application/merge-patch+json"}
    )
    assert response.status_code == 415


@pytest.mark.parametrize(
    ("kinds", "status"),
    [(["text/plain", "application/json"], 415), (["application/json"] * 2, 201)],
    ids=["different", "equal"],
)
async def test_the_first_of_several_content_types_counts(api: Api, kinds: list[str], status: int) -> None:
    headers = [("Authorization", f"Bearer {api.person().token()}"), *(("Content-Type", kind) for kind in kinds)]
    assert (await api.http.post(TASKS, content=b'{"title":"t"}', headers=headers)).status_code == status
