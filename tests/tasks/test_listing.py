"""What a listing can be narrowed by: each filter, the search, the bin, and the count."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from backend.database import SYSTEM, Database
from tests.conftest import Api, Person
from tests.database.test_executor import raw
from tests.tasks.test_paging import walk

TASKS = "/api/v1/tasks"


async def titles(person: Person, **params: Any) -> list[str]:
    response = await person.get(TASKS, params={"sort": "created_at", "limit": 100, **params})
    assert response.status_code == 200, response.text
    return [task["title"] for task in response.json()["items"]]


async def owner(person: Person) -> UUID:
    return UUID((await person.get("/api/v1/users/me")).json()["id"])


async def test_each_sort_in_both_directions(api: Api) -> None:
    ada = api.person()
    for title, members in {
        "b": {"priority": "urgent", "due_at": "2030-01-01T00:00:00Z"},
        "\uffee": {"priority": "low"},
        "\U0001f389": {"priority": "high", "due_at": "2020-01-01T00:00:00Z"},
        "Z": {"priority": "normal"},
    }.items():
        await ada.task(title, **members)
    for sort, expected in {
        "created_at": ["b", "\uffee", "\U0001f389", "Z"],
        "updated_at": ["b", "\uffee", "\U0001f389", "Z"],
        "title": ["Z", "b", "\uffee", "\U0001f389"],
        "priority": ["\uffee", "Z", "\U0001f389", "b"],
    }.items():
        assert await titles(ada, sort=sort) == expected
        assert await titles(ada, sort=f"-{sort}") == expected[::-1]
    assert await titles(ada, sort="due_at") == ["\U0001f389", "b", "\uffee", "Z"]
    assert await titles(ada, sort="-due_at") == ["b", "\U0001f389", "Z", "\uffee"], (
        "no date is last, ties follow the sort"
    )


async def test_due_dates_compare_exclusively_and_need_to_be_there(api: Api) -> None:
    ada = api.person()
    for day in "2030-01-01", "2030-01-02", "2030-01-03":
        await ada.task(day, due_at=f"{day}T00:00:00Z")
    await ada.task("some day")
    noon = "2030-01-02T00:00:00Z"
    assert await titles(ada, due_before=noon) == ["2030-01-01"]
    assert await titles(ada, due_after=noon) == ["2030-01-03"]
    assert await titles(ada, due_before="2030-01-02T01:00:00+01:00") == ["2030-01-01"]
    assert await titles(ada, due_after="2030-01-01T00:00:00Z", due_before="2030-01-03T00:00:00Z") == ["2030-01-02"]
    assert await titles(ada, due_before="9999-12-31T23:59:59Z", due_after="0001-01-01T00:00:00Z") != []


async def test_overdue_is_what_the_task_says(api: Api) -> None:
    ada = api.person()
    past, future = ((datetime.now(UTC) + timedelta(days=days)).isoformat() for days in (-1, 1))
    await ada.task("late", due_at=past)
    await ada.task("done late", due_at=past, status="done")
    await ada.task("in time", due_at=future)
    await ada.task("some day")
    assert await titles(ada, overdue="true") == ["late"]
    assert await titles(ada, overdue="false") == ["done late", "in time", "some day"]
    items = (await ada.get(TASKS, params={"overdue": "true"})).json()["items"]
    assert [task["is_overdue"] for task in items] == [True]


@pytest.mark.parametrize(
    ("title", "description", "q", "found"),
    [
        pytest.param("Buy MILK", None, "milk", True, id="case"),
        pytest.param("milk", None, "MiLk", True, id="case of what is searched"),
        pytest.param("x", "Two LITRES", "litres", True, id="description"),
        pytest.param("x", None, "y", False, id="absent"),
        pytest.param("ÉTÉ", None, "été", True, id="accents have cases"),
        pytest.param("été", None, "ete", False, id="accents count"),
        pytest.param("STRASSE", None, "straße", True, id="sharp s, full folding"),
        pytest.param("Straße", None, "STRASSE", True, id="sharp s, the other way"),
        pytest.param("ΣΊΣΥΦΟΣ", None, "σίσυφος", True, id="final sigma"),
        pytest.param("İSTANBUL", None, "i̇stanbul", True, id="dotted capital I"),
        pytest.param("ISTANBUL", None, "istanbul", True, id="I is i in every language"),
        pytest.param("\u0131l\u0131k", None, "ilik", False, id="dotless i is a letter of its own"),
        pytest.param("ПРИВЕТ", None, "привет", True, id="Cyrillic"),
        pytest.param("🎉 Party 👩‍👩‍👧", None, "👩‍👩‍👧", True, id="emoji"),
        pytest.param("🎉", None, "🎊", False, id="another emoji"),
        pytest.param("牛乳を買う", None, "牛乳", True, id="no spaces between words"),
        pytest.param("100 % sure", None, "0 %", True, id="percent"),
        pytest.param("abc", None, "a%c", False, id="percent is no wildcard"),
        pytest.param("abc", None, "a_c", False, id="underscore is no wildcard"),
        pytest.param("snake_case", None, "e_c", True, id="underscore"),
        pytest.param("back\\slash", None, "\\s", True, id="backslash"),
        pytest.param("it's", None, "'", True, id="quote"),
        pytest.param("left", "right", "leftXright", False, id="not across"),
        pytest.param("left", "right", "ftri", False, id="not across, as if there were nothing between"),
        pytest.param("left", "right", "ftxri", False, id="not across, small"),
        pytest.param("a\nb", None, "a\nb", True, id="lines"),
        pytest.param("anything", None, "", True, id="nothing is in everything"),
    ],
)
async def test_search(api: Api, title: str, description: str | None, q: str, found: bool) -> None:
    ada = api.person()
    await ada.task(title, description=description)
    assert await titles(ada, q=q) == ([title] if found else [])


async def test_search_follows_a_change(api: Api) -> None:
    ada = api.person()
    task = await ada.task("before")
    await ada.patch(f"{TASKS}/{task['id']}", {"title": "after", "description": "LATER"})
    assert [await titles(ada, q=q) for q in ("before", "after", "later")] == [[], ["after"], ["after"]]


async def test_the_bin_holds_what_was_deleted_in_thirty_days(api: Api) -> None:
    ada, eve = api.person(), api.person()
    kept, binned, old = [await ada.task(title) for title in ("kept", "binned", "old")]
    for task in binned, old:
        await ada.delete(f"{TASKS}/{task['id']}")
    database = Database(api.state["pool"], SYSTEM)
    await database.rows(raw("UPDATE tasks SET deleted_at = now() - interval '30 days' WHERE id = :id"), id=old["id"])
    assert await titles(ada) == await titles(ada, deleted="false") == [kept["title"]]
    assert await titles(ada, deleted="true") == ["binned"]
    assert await titles(ada, deleted="true", q="KEPT") == []
    assert await titles(eve, deleted="true") == []
    item = (await ada.get(TASKS, params={"deleted": "true"})).json()["items"][0]
    assert item["deleted_at"] == item["updated_at"]


async def test_the_count_is_of_all_pages(api: Api) -> None:
    ada = api.person()
    assert (await ada.get(TASKS, params={"count": "exact"})).json() == {"items": [], "next_cursor": None, "total": 0}
    for number in range(5):
        await ada.task(f"{number}", status="done" if number else "todo")
    first = (await ada.get(TASKS, params={"count": "exact", "limit": 2, "status": "done"})).json()
    assert (first["total"], len(first["items"])) == (4, 2)
    rest = (await ada.get(TASKS, params={"count": "exact", "status": "done", "cursor": first["next_cursor"]})).json()
    assert (rest["total"], len(rest["items"]), rest["next_cursor"]) == (4, 2, None)
    for task in rest["items"]:
        await ada.delete(f"{TASKS}/{task['id']}")
    past_the_end = {"count": "exact", "status": "done", "cursor": first["next_cursor"]}
    assert (await ada.get(TASKS, params=past_the_end)).json() == {"items": [], "next_cursor": None, "total": 2}
    assert "total" not in (await ada.get(TASKS)).json()


@pytest.mark.parametrize(
    "params",
    [
        {"priority": "highest"},
        {"due_before": "tomorrow"},
        {"due_before": "2030-01-01"},
        {"due_after": "1700000000"},
        {"overdue": "1"},
        {"deleted": "yes"},
        {"count": "estimated"},
        {"q": "\0"},
        {"q": "x" * 201},
        {"sort": "-"},
        {"sort": "--title"},
        {"sort": "status"},
    ],
    ids=str,
)
async def test_what_is_not_offered_is_a_422(api: Api, params: dict[str, str]) -> None:
    response = await api.person().get(TASKS, params=params)
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["query", *params]


async def test_a_search_looks_through_ten_thousand_tasks(api: Api) -> None:
    """Whether what it finds is many or few, first or last, in a short text or a long one."""
    ada = api.person()
    seed = raw(
        "INSERT INTO tasks (owner_id, title, description, status, priority, created_at)"
        " SELECT CAST(:owner AS uuid), 'Task number ' || n,"
        " repeat('Some words about it. ', n % 5 * CASE n % 50 WHEN 1 THEN 100 ELSE 1 END),"
        " 'todo', 'normal', now() - n * interval '1 minute' FROM generate_series(1, 10000) n"
    )
    await Database(api.state["pool"], SYSTEM).rows(seed, owner=await owner(ada))
    for q, total in {"zebra": 0, "TASK NUMBER 9999": 1, "number 77": 111, "words about": 8000}.items():
        for sort in "created_at", "-created_at", "title":
            page = (await ada.get(TASKS, params={"q": q, "count": "exact", "limit": 2, "sort": sort})).json()
            assert (page["total"], len(page["items"]), page["next_cursor"] is None) == (total, min(2, total), total < 2)
    found = await walk(ada, q="number 77", limit=50)
    numbers = [n for n in range(1, 10001) if f"{n}".startswith("77")]
    assert [task["title"] for task in found] == [f"Task number {n}" for n in numbers]


@pytest.mark.parametrize("letter", ["x", "é", "🎉"])
async def test_a_search_reads_texts_of_any_length(api: Api, letter: str) -> None:
    """Those that fit into an index, and those that do not."""
    ada = api.person()
    around = [length // len(letter.encode()) + more for length in (1500, 2700, 8190) for more in (-9, -1, 0, 1)]
    lengths = [0, 1, *around, 10_000 - len("end")]
    for length in lengths:
        await ada.task(f"{length}", description=f"{letter * length}End")
    for q, count in {"END": len(lengths), f"{letter}end": len(lengths) - 1, letter * 200: len(lengths) - 2}.items():
        assert await titles(ada, q=q) == [f"{length}" for length in lengths][-count:]
    assert await titles(ada, q="1", sort="-created_at") == [f"{n}" for n in lengths[::-1] if "1" in f"{n}"]
