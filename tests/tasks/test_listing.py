"""GET /tasks: sort orders, filters, search, the trash, and the exact count."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from backend.database import SYSTEM, Database
from backend.resources import pagination
from backend.resources.pagination import PageQuery
from tests.conftest import Api, Person
from tests.database.test_executor import raw
from tests.tasks.test_paging import walk
from tests.users.test_lifecycle import id_of

TASKS = "/api/v1/tasks"


async def titles(person: Person, **params: Any) -> list[str]:
    response = await person.get(TASKS, params={"sort": "created_at", "limit": 100, **params})
    assert response.status_code == 200, response.text
    return [task["title"] for task in response.json()["items"]]


async def test_tasks_sort_by_each_key_in_both_directions(api: Api) -> None:
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
    # Missing dates are last in both directions; ties follow the direction.
    assert await titles(ada, sort="-due_at") == ["b", "\U0001f389", "Z", "\uffee"]


async def test_due_filters_are_exclusive_and_skip_tasks_without_a_date(api: Api) -> None:
    ada = api.person()
    for day in "2030-01-01", "2030-01-02", "2030-01-03":
        await ada.task(day, due_at=f"{day}T00:00:00Z")
    await ada.task("no date")
    second = "2030-01-02T00:00:00Z"
    assert await titles(ada, due_before=second) == ["2030-01-01"]
    assert await titles(ada, due_after=second) == ["2030-01-03"]
    assert await titles(ada, due_before="2030-01-02T01:00:00+01:00") == ["2030-01-01"]
    assert await titles(ada, due_after="2030-01-01T00:00:00Z", due_before="2030-01-03T00:00:00Z") == ["2030-01-02"]
    assert await titles(ada, due_before="9999-12-31T23:59:59Z", due_after="0001-01-01T00:00:00Z") != []


async def test_the_overdue_filter_agrees_with_is_overdue(api: Api) -> None:
    ada = api.person()
    past, future = ((datetime.now(UTC) + timedelta(days=days)).isoformat() for days in (-1, 1))
    await ada.task("late", due_at=past)
    await ada.task("done late", due_at=past, status="done")
    await ada.task("in time", due_at=future)
    await ada.task("no date")
    assert await titles(ada, overdue="true") == ["late"]
    assert await titles(ada, overdue="false") == ["done late", "in time", "no date"]
    items = (await ada.get(TASKS, params={"overdue": "true"})).json()["items"]
    assert [task["is_overdue"] for task in items] == [True]


@pytest.mark.parametrize(
    ("title", "description", "q", "found"),
    [
        pytest.param("Buy MILK", None, "milk", True, id="case of the title"),
        pytest.param("milk", None, "MiLk", True, id="case of the search text"),
        pytest.param("x", "Two LITRES", "litres", True, id="description"),
        pytest.param("x", None, "y", False, id="absent"),
        pytest.param("ÉTÉ", None, "été", True, id="case of accented letters"),
        pytest.param("été", None, "ete", False, id="accents are significant"),
        pytest.param("STRASSE", None, "straße", True, id="ß finds SS"),
        pytest.param("Straße", None, "STRASSE", True, id="SS finds ß"),
        pytest.param("ΣΊΣΥΦΟΣ", None, "σίσυφος", True, id="final sigma"),
        pytest.param("İSTANBUL", None, "i̇stanbul", True, id="dotted capital I"),
        pytest.param("ISTANBUL", None, "istanbul", True, id="I folds to i in every locale"),
        pytest.param("\u0131l\u0131k", None, "ilik", False, id="dotless i is not i"),
        pytest.param("🎉 Party 👩‍👩‍👧", None, "👩‍👩‍👧", True, id="emoji"),
        pytest.param("牛乳を買う", None, "牛乳", True, id="text without spaces"),
        pytest.param("abc", None, "a%c", False, id="percent is not a wildcard"),
        pytest.param("abc", None, "a_c", False, id="underscore is not a wildcard"),
        pytest.param("back\\slash", None, "\\s", True, id="backslash is not an escape"),
        pytest.param("left", "right", "leftXright", False, id="stored separator of title and description"),
        pytest.param("left", "right", "ftri", False, id="across title and description"),
        pytest.param("anything", None, "", True, id="empty"),
    ],
)
async def test_search_finds_substrings_regardless_of_case(
    api: Api, title: str, description: str | None, q: str, found: bool
) -> None:
    ada = api.person()
    await ada.task(title, description=description)
    assert await titles(ada, q=q) == ([title] if found else [])


async def test_search_finds_the_new_text_after_an_update(api: Api) -> None:
    ada = api.person()
    task = await ada.task("before")
    await ada.patch(f"{TASKS}/{task['id']}", {"title": "after", "description": "LATER"})
    assert [await titles(ada, q=q) for q in ("before", "after", "later")] == [[], ["after"], ["after"]]


async def test_the_trash_lists_tasks_deleted_in_the_last_30_days(api: Api) -> None:
    ada, eve = api.person(), api.person()
    live, trashed, old = [await ada.task(title) for title in ("live", "trashed", "old")]
    for task in trashed, old:
        await ada.delete(f"{TASKS}/{task['id']}")
    database = Database(api.state["pool"], SYSTEM)
    await database.rows(raw("UPDATE tasks SET deleted_at = now() - interval '30 days' WHERE id = :id"), id=old["id"])
    assert await titles(ada) == await titles(ada, deleted="false") == [live["title"]]
    assert await titles(ada, deleted="true") == [trashed["title"]]
    assert await titles(ada, deleted="true", q="LIVE") == []
    assert await titles(eve, deleted="true") == []
    item = (await ada.get(TASKS, params={"deleted": "true"})).json()["items"][0]
    assert item["deleted_at"] == item["updated_at"]


async def test_an_exact_count_covers_all_pages(api: Api) -> None:
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
        {"limit": "0"},
        {"limit": "101"},
        {"limit": "1_0"},
        {"status": "unknown"},
        {"priority": "highest"},
        {"due_before": "tomorrow"},
        {"due_before": "2030-01-01"},
        {"due_after": "1700000000"},
        {"overdue": "1"},
        {"count": "estimated"},
        {"q": "\0"},
        {"q": "x" * 201},
        {"sort": "title; drop table tasks"},
    ],
    ids=lambda params: "=".join(*params.items())[:30],
)
async def test_an_invalid_query_parameter_is_a_422(api: Api, params: dict[str, str]) -> None:
    response = await api.person().get(TASKS, params=params)
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["query", *params]


async def test_search_pages_and_counts_are_exact_among_10_000_tasks(api: Api) -> None:
    """Frequent and rare texts, in short and long descriptions, near the start and the end of the list."""
    ada = api.person()
    seed = raw(
        "INSERT INTO tasks (owner_id, title, description, status, priority, created_at)"
        " SELECT CAST(:owner AS uuid), 'Task number ' || n,"
        " repeat('Some words about it. ', n % 5 * CASE n % 50 WHEN 1 THEN 100 ELSE 1 END),"
        " 'todo', 'normal', now() - n * interval '1 minute' FROM generate_series(1, 10000) n"
    )
    await Database(api.state["pool"], SYSTEM).rows(seed, owner=await id_of(ada))
    for q, total in {"zebra": 0, "TASK NUMBER 9999": 1, "number 77": 111, "words about": 8000}.items():
        for sort in "created_at", "-created_at", "title":
            page = (await ada.get(TASKS, params={"q": q, "count": "exact", "limit": 2, "sort": sort})).json()
            assert (page["total"], len(page["items"]), page["next_cursor"] is None) == (total, min(2, total), total < 2)
    found = await walk(ada, q="number 77", limit=50)
    numbers = [n for n in range(1, 10001) if f"{n}".startswith("77")]
    assert [task["title"] for task in found] == [f"Task number {n}" for n in numbers]


@pytest.mark.parametrize("letter", ["x", "é", "🎉"])
async def test_search_covers_texts_of_any_length(api: Api, letter: str) -> None:
    """Including texts that are too long for an index."""
    ada = api.person()
    around = [length // len(letter.encode()) + more for length in (1500, 2700, 8190) for more in (-9, -1, 0, 1)]
    lengths = [0, 1, *around, 10_000 - len("end")]
    for length in lengths:
        await ada.task(f"{length}", description=f"{letter * length}End")
    for q, count in {"END": len(lengths), f"{letter}end": len(lengths) - 1, letter * 200: len(lengths) - 2}.items():
        assert await titles(ada, q=q) == [f"{length}" for length in lengths][-count:]
    assert await titles(ada, q="1", sort="-created_at") == [f"{n}" for n in lengths[::-1] if "1" in f"{n}"]


def test_a_field_of_the_query_without_a_filter_is_refused() -> None:
    class Query(PageQuery):
        status: str | None = None
        q: str | None = None
        count: str | None = None
        sort: str = "-created_at"

    pagination.check_filters(Query, ["status", "q"], others=["count"])
    with pytest.raises(ValueError, match=r"^the field `q` of Query has no condition in FILTERS$"):
        pagination.check_filters(Query, ["status"], others=["count"])
