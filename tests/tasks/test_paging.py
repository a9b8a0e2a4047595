"""Cursor pages of GET /tasks: complete, ordered, and stable under concurrent writes."""

import asyncio
import json
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backend.database import Database, Row, Statement
from backend.resources.pagination import encode, fingerprint
from backend.tasks import listing
from backend.tasks.models import Priority, Status
from backend.tasks.schemas import Sort
from tests.conftest import Api, Person

TASKS = "/api/v1/tasks"


async def walk(person: Person, **params: Any) -> list[dict[str, Any]]:
    """Follow `next_cursor` to the end."""
    seen: list[dict[str, Any]] = []
    while True:
        response = await person.get(TASKS, params=params)
        assert response.status_code == 200, response.text
        page = response.json()
        assert len(page["items"]) <= params["limit"]
        seen += page["items"]
        if page["next_cursor"] is None:
            assert "link" not in response.headers
            return seen
        assert len(page["items"]) == params["limit"]
        params["cursor"] = page["next_cursor"]


def tasks() -> st.SearchStrategy[dict[str, Any]]:
    """Few distinct values, for many ties. Titles sort differently by code point, UTF-16 unit and locale."""
    return st.fixed_dictionaries(
        {
            "title": st.sampled_from(["a", "B", "b", "\u00e9", "e\u0301", "\uffee", "\U0001f389", "a b", "_"]),
            "status": st.sampled_from([status.value for status in Status]),
            "priority": st.sampled_from([priority.value for priority in Priority]),
            "due_at": st.sampled_from([None, "0001-01-01T00:00:00Z", "2020-02-02T02:02:02Z", "9999-12-31T23:59:59Z"]),
            "tags": st.sampled_from([[], ["t"], ["T", "u"]]),
        }
    )


def is_listed(task: dict[str, Any], params: dict[str, Any]) -> bool:
    """Whether the task matches the filters: the model. All due dates are far from the present."""
    overdue = (task["due_at"] or "9") < "2025" and task["status"] != "done"
    names = {name.casefold() for name in task["tags"]}
    matches: dict[str, Callable[[Any], bool]] = {
        "status": lambda value: task["status"] == value,
        "priority": lambda value: task["priority"] == value,
        "due_before": lambda value: task["due_at"] is not None and task["due_at"] < value,
        "due_after": lambda value: task["due_at"] is not None and task["due_at"] > value,
        "overdue": lambda value: overdue is (value == "true"),
        "q": lambda value: value.casefold() in task["title"].casefold(),
        "tag": lambda value: {name.casefold() for name in value} <= names,
    }
    return all(matches[name](value) for name, value in params.items())


def sorted_ids(rows: list[dict[str, Any]], sort: str) -> list[str]:
    """The ids in the order of the list: the model."""
    key, descending = sort.removeprefix("-"), sort.startswith("-")
    rows = sorted(rows, key=lambda row: row["id"], reverse=descending)
    if key == "priority":
        levels = [priority.value for priority in Priority]
        rows.sort(key=lambda row: levels.index(row["priority"]), reverse=descending)
    else:
        rows.sort(key=lambda row: row[key] or "", reverse=descending)
        rows.sort(key=lambda row: row[key] is None)
    return [row["id"] for row in rows]


@contextmanager
def scanning_first(rows: int) -> Iterator[None]:
    """Let a search read this number of rows in list order before it scans all texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "SCANNED_FIRST", rows)
        listing.listing.cache_clear()
        yield
    listing.listing.cache_clear()


async def trash(person: Person, id: str) -> None:
    assert (await person.delete(f"{TASKS}/{id}")).status_code == 204


@pytest.mark.parametrize("sort", get_args(Sort))
@given(
    created=st.lists(tasks(), max_size=12),
    limit=st.integers(1, 4),
    filters=st.fixed_dictionaries(
        {},
        optional={
            "status": st.sampled_from(Status).map(lambda status: status.value),
            "priority": st.sampled_from(Priority).map(lambda priority: priority.value),
            "due_before": st.sampled_from(["2020-02-02T02:02:02Z", "2030-01-01T00:00:00Z"]),
            "due_after": st.sampled_from(["0001-01-01T00:00:00Z", "2020-02-02T02:02:02Z"]),
            "overdue": st.sampled_from(["true", "false"]),
            "q": st.sampled_from(["A", "\u00c9", "_", "%", ""]),
            "tag": st.sampled_from([["t"], ["U", "t"], ["none"]]),
        },
    ),
    deleted=st.booleans(),
    scanned_first=st.sampled_from([1, 3, listing.SCANNED_FIRST]),
    writes=st.lists(st.tuples(st.sampled_from(["insert", "change", "remove"]), st.integers(0, 11), tasks())),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_pages_have_each_unchanged_row_once_in_order(
    api: Api,
    sort: str,
    created: list[dict[str, Any]],
    limit: int,
    filters: dict[str, Any],
    deleted: bool,
    scanned_first: int,
    writes: list[tuple[str, int, dict[str, Any]]],
) -> None:
    """With a concurrent write for each page, for live tasks and the trash."""
    ada = api.person()
    rows = [await ada.task(**task) for task in created]
    params = {"sort": sort, "deleted": "true" if deleted else "false", **filters}
    if deleted:
        for row in rows:
            await trash(ada, row["id"])
        rows = (await ada.get(TASKS, params={"deleted": "true", "limit": 100})).json()["items"]
    touched = set()

    async def write(event: str, id: str, task: dict[str, Any]) -> None:
        if event == "insert":
            id = (await ada.task(**task))["id"]
            touched.add(id)
            if deleted:
                await trash(ada, id)
            return
        touched.add(id)
        if deleted:
            assert (await ada.post(f"{TASKS}/{id}/restore")).status_code == 200
        if event == "change":
            await ada.patch(f"{TASKS}/{id}", task)
        if deleted is (event == "change"):
            await trash(ada, id)

    with scanning_first(scanned_first) if "q" in filters else nullcontext():
        events, seen, cursor = iter(writes), [], None
        while True:
            reading = ada.get(TASKS, params={**params, "limit": limit} | ({"cursor": cursor} if cursor else {}))
            event, number, task = next(events, (None, 0, {}))
            writing = write(event, rows[number % len(rows)]["id"], task) if event and rows else asyncio.sleep(0)
            response, _ = await asyncio.gather(reading, writing)
            assert response.status_code == 200, response.text
            seen += [task["id"] for task in response.json()["items"]]
            cursor = response.json()["next_cursor"]
            if cursor is None:
                break

        expected = sorted_ids([row for row in rows if row["id"] not in touched and is_listed(row, filters)], sort)
        assert [id for id in seen if id not in touched] == expected
        if not touched:
            counted = await ada.get(TASKS, params={**params, "limit": 1, "count": "exact"})
            assert counted.json()["total"] == len(expected)
            assert [task["id"] for task in counted.json()["items"]] == expected[:1]


async def test_rows_of_equal_times_sort_by_id(api: Api) -> None:
    ada = api.person()
    rows = [await ada.task(f"{number}") for number in range(5)]
    async with api.state["pool"].connection() as connection:
        await connection.execute(
            "UPDATE tasks SET created_at = '2026-01-01Z' WHERE id = ANY(%s)", ([row["id"] for row in rows],)
        )
    assert [row["id"] for row in await walk(ada, limit=2, sort="created_at")] == sorted(row["id"] for row in rows)


async def test_a_page_reads_one_row_more_than_its_limit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = api.person()
    for number in range(5):
        await ada.task(f"{number}")
    read: list[int] = []
    rows = Database.rows

    async def counted(self: Database, statement: Statement, **values: object) -> list[Row]:
        found = await rows(self, statement, **values)
        read.append(len(found))
        return found

    monkeypatch.setattr(Database, "rows", counted)
    await ada.get(TASKS, params={"limit": 2})
    assert read == [3]


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("cursor", ""),
        ("cursor", "&q=%3E%26"),
        ("cursor", "&limit=1&status=todo"),
        ("cursor", "&tag=a%20b&tag=c+d"),
        ("%63ursor", ""),
    ],
)
async def test_the_link_header_keeps_the_query(api: Api, name: str, rest: str) -> None:
    """With percent-encoded and repeated parameters."""
    ada, seen = api.person(), []
    for number in range(4):
        await ada.task(f"{number}>&", tags=["a b", "c d"])
    url = f"{TASKS}?limit=1{rest}"
    for _ in range(4):
        page = await ada.get(url)
        seen += [task["title"] for task in page.json()["items"]]
        link = page.headers.get("link", "<>; ").partition(">; ")[0].removeprefix("<")
        assert link.count("ursor=") == (0 if len(seen) == 4 else 1)
        url = link.replace("cursor=", f"{name}=", 1)
    assert seen == [f"{number}>&" for number in (3, 2, 1, 0)]


async def test_a_cursor_of_another_list_is_refused(api: Api) -> None:
    ada = api.person()
    for number in range(2):
        await ada.task(f"{number}")
    cursor = (await ada.get(TASKS, params={"limit": 1})).json()["next_cursor"]
    assert (await ada.get(TASKS, params={"limit": 7, "cursor": cursor})).status_code == 200
    others: list[dict[str, str]] = [
        {"sort": "created_at"},
        {"sort": "-updated_at"},
        {"status": "todo"},
        {"q": ""},
        {"deleted": "true"},
    ]
    for params in others:
        response = await ada.get(TASKS, params={"cursor": cursor, **params})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")


@pytest.mark.parametrize(
    "cursor",
    [
        pytest.param("a", id="no base64url"),
        pytest.param("\u00e9", id="not ASCII"),
        pytest.param("eA", id="no JSON"),
        pytest.param("W10", id="empty list"),
        pytest.param("W1tdXQ", id="list of a list"),
        pytest.param("WyIiLCIiLCIiXQ", id="empty strings"),
        pytest.param("W" * 998 + "\0", id="NUL"),
    ],
)
async def test_an_invalid_cursor_is_refused(api: Api, cursor: str) -> None:
    response = await api.person().get(TASKS, params={"cursor": cursor})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")


@given(cursor=st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.hex()))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_random_cursor_is_refused(api: Api, cursor: str) -> None:
    assert (await api.person(sub="fuzz").get(TASKS, params={"cursor": cursor})).status_code == 422


@given(
    sort=st.sampled_from(get_args(Sort)),
    key=st.none() | st.text(max_size=20) | st.datetimes(timezones=st.timezones()) | st.sampled_from(Priority),
    id=st.uuids() | st.text(max_size=20),
)
@example(sort="title", key="\0", id=UUID(int=0))
@example(sort="created_at", key="0001-01-01T00:00:00+23:59", id=UUID(int=0))
@example(sort="due_at", key="1e300", id=UUID(int=0))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_forged_cursor_is_never_a_server_error(api: Api, sort: str, key: object, id: Any) -> None:
    cursor = encode(fingerprint("tasks", sort, {"deleted": False}), key, id)
    response = await api.person(sub="forger").get(TASKS, params={"cursor": cursor, "sort": sort})
    assert response.status_code == 200 or response.json()["code"] == "invalid_cursor"


async def test_a_cursor_with_a_lone_surrogate_is_refused(api: Api) -> None:
    """JSON can escape a lone surrogate, which UTF-8 cannot encode."""
    payload = json.dumps([fingerprint("tasks", "title", {"deleted": False}), "\ud800", str(UUID(int=0))])
    cursor = urlsafe_b64encode(payload.encode()).decode().rstrip("=")
    response = await api.person().get(TASKS, params={"cursor": cursor, "sort": "title"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")
