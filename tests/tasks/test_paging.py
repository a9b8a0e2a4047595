"""Walking the pages gives every row exactly once, in order, whatever happens meanwhile."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.database import Database, Row, Statement
from backend.tasks.models import Status
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


@given(
    statuses=st.lists(st.sampled_from(Status), max_size=12),
    limit=st.integers(1, 5),
    wanted=st.none() | st.sampled_from(Status),
    sort=st.sampled_from(["created_at", "-created_at"]),
    during=st.lists(st.sampled_from(["insert", "delete"]), max_size=3),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_untouched_row_exactly_once_in_order(
    api: Api, statuses: list[Status], limit: int, wanted: Status | None, sort: str, during: list[str]
) -> None:
    ada = api.person()
    rows = [await ada.task(f"{number}", status=status) for number, status in enumerate(statuses)]
    params: dict[str, Any] = {"limit": limit, "sort": sort} | ({"status": wanted} if wanted else {})

    first = (await ada.get(TASKS, params=params)).json()
    seen, touched = first["items"], set()
    for event in during:
        if event == "insert":
            touched.add((await ada.task("late", status=wanted or "todo"))["id"])
        elif rows:
            touched.add(rows[0]["id"])
            await ada.delete(f"{TASKS}/{rows[0]['id']}")
    if first["next_cursor"]:
        seen = seen + await walk(ada, **params, cursor=first["next_cursor"])

    expected = [row["id"] for row in rows if wanted in (None, row["status"]) and row["id"] not in touched]
    ids = [row["id"] for row in seen]
    assert len(ids) == len(set(ids))
    assert [id for id in ids if id not in touched] == (expected if sort == "created_at" else expected[::-1])


async def test_equal_times_are_told_apart_by_id(api: Api) -> None:
    ada = api.person()
    rows = [await ada.task(f"{number}") for number in range(5)]
    async with api.state["pool"].connection() as connection:
        await connection.execute(
            "UPDATE tasks SET created_at = '2026-01-01Z' WHERE id = ANY(%s)", ([row["id"] for row in rows],)
        )
    assert [row["id"] for row in await walk(ada, limit=2, sort="created_at")] == sorted(row["id"] for row in rows)


async def test_a_page_reads_one_row_more_than_it_shows(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_the_link_header_is_the_next_page(api: Api) -> None:
    ada = api.person()
    for number in range(3):
        await ada.task(f"{number}", status="done")
    first = await ada.get(TASKS, params={"limit": 2, "status": "done", "sort": "created_at"})
    link = first.headers["link"]
    assert link.startswith("</api/v1/tasks?")
    assert link.endswith('>; rel="next"')
    second = await ada.get(link[1 : link.index(">")])
    assert [task["title"] for task in second.json()["items"]] == ["2"]


async def test_a_cursor_of_another_listing_is_refused(api: Api) -> None:
    ada = api.person()
    for number in range(2):
        await ada.task(f"{number}")
    cursor = (await ada.get(TASKS, params={"limit": 1})).json()["next_cursor"]
    assert (await ada.get(TASKS, params={"limit": 7, "cursor": cursor})).status_code == 200
    for params in {"sort": "created_at"}, {"status": "todo"}:
        response = await ada.get(TASKS, params={"cursor": cursor, **params})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")


@pytest.mark.parametrize(
    "cursor",
    ["", "a", "eA", "!!!", "\u00e9", "W10", "bnVsbA", "W1tdXQ", "WyIiLCIiLCIiXQ", "A" * 999, "W" * 998 + "\0"],
)
async def test_a_made_up_cursor_is_refused(api: Api, cursor: str) -> None:
    response = await api.person().get(TASKS, params={"cursor": cursor})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")


@given(cursor=st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.hex()))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_cursor_is_ever_a_5xx(api: Api, cursor: str) -> None:
    assert (await api.person(sub="fuzz").get(TASKS, params={"cursor": cursor})).status_code == 422


async def test_somebody_elses_cursor_shows_only_ones_own(api: Api) -> None:
    ada, eve = api.person(), api.person()
    for number in range(3):
        await ada.task(f"{number}")
    cursor = (await ada.get(TASKS, params={"limit": 1})).json()["next_cursor"]
    assert (await eve.get(TASKS, params={"cursor": cursor})).json()["items"] == []
