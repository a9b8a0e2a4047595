"""Tags: made on first use, unique by case-folded name, and never lost between two writers."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import Api, Person

TASKS = "/api/v1/tasks"
TAGS = "/api/v1/tags"


async def tags(person: Person) -> dict[str, int]:
    """Name -> count, in the order of the answer."""
    response = await person.get(TAGS)
    assert response.status_code == 200
    return {tag["name"]: tag["task_count"] for tag in response.json()["items"]}


async def tag_id(person: Person, name: str) -> str:
    found: list[str] = [tag["id"] for tag in (await person.get(TAGS)).json()["items"] if tag["name"] == name]
    return found[0]


async def test_a_task_takes_and_shows_tags(api: Api) -> None:
    ada = api.person()
    task = await ada.task(tags=["work", "Home", "HOME"])
    assert task["tags"] == ["Home", "work"]
    other = await ada.task(tags=["home", "Straße"])
    assert other["tags"] == ["Home", "Straße"], "as they were first stored"
    assert (await ada.task(tags=["STRASSE"]))["tags"] == ["Straße"]
    assert await tags(ada) == {"Home": 2, "Straße": 2, "work": 1}
    url = f"{TASKS}/{task['id']}"
    assert (await ada.get(url)).json() == task
    items = (await ada.get(TASKS, params={"sort": "created_at", "count": "exact"})).json()["items"]
    assert [item["tags"] for item in items] == [["Home", "work"], ["Home", "Straße"], ["Straße"]]
    await ada.delete(url)
    assert await tags(ada) == {"Home": 1, "Straße": 2, "work": 0}
    assert (await ada.post(f"{url}/restore")).json()["tags"] == ["Home", "work"]


@pytest.mark.parametrize(
    ("patch", "after", "changed"),
    [
        ({"tags": ["b", "a"]}, ["a", "b"], False),
        ({"tags": ["A", "B", "b"]}, ["a", "b"], False),
        ({"title": "other"}, ["a", "b"], True),
        ({"tags": ["a"]}, ["a"], True),
        ({"tags": ["c", "a"]}, ["a", "c"], True),
        ({"tags": []}, [], True),
        ({"tags": None}, [], True),
        ({"tags": ["a", "b"], "title": "other"}, ["a", "b"], True),
    ],
    ids=str,
)
async def test_patching_tags(api: Api, patch: dict[str, Any], after: list[str], changed: bool) -> None:
    ada = api.person()
    task = await ada.task(tags=["a", "b"])
    url = f"{TASKS}/{task['id']}"
    patched = (await ada.patch(url, patch)).json()
    assert (patched["tags"], patched["version"]) == (after, 1 + changed)
    assert list(patched) == list(task)
    assert (await ada.get(url)).json() == patched
    stale = await ada.patch(url, {"tags": ["stale"]}, headers={"If-Match": '"7"'})
    assert stale.status_code == 412
    assert "stale" not in await tags(ada)


async def test_putting_tags(api: Api) -> None:
    ada = api.person()
    url = f"{TASKS}/{uuid4()}"
    made = await ada.put(url, {"title": "x", "tags": ["b", "a"]})
    assert (made.status_code, made.json()["tags"]) == (201, ["a", "b"])
    same = await ada.put(url, {"title": "x", "tags": ["A", "B"]})
    assert (same.status_code, same.json()) == (200, made.json())
    for headers in {}, {"If-Match": "*"}:
        assert (await ada.put(url, {"title": "x", "tags": ["c"]}, headers=headers)).json()["tags"] == ["c"]
        assert (await ada.put(url, {"title": "x"}, headers=headers)).json()["tags"] == []
    assert (await ada.get(url)).json()["version"] == 5
    missing = await ada.patch(f"{TASKS}/{uuid4()}", {"tags": ["never"]})
    assert missing.status_code == 404
    assert await tags(ada) == {"a": 0, "b": 0, "c": 0}


async def test_every_tag_of_a_filter_must_match(api: Api) -> None:
    ada, eve = api.person(), api.person()
    await eve.task("eve's", tags=["a", "b"])
    for title, names in {"none": [], "a": ["a"], "b": ["b"], "ab": ["a", "b"], "abc": ["a", "b", "c"]}.items():
        await ada.task(title, tags=names)
    for wanted, found in [
        (["a"], ["a", "ab", "abc"]),
        (["A", "b"], ["ab", "abc"]),
        (["a", "A"], ["a", "ab", "abc"]),
        (["a", "b", "c"], ["abc"]),
        (["a", "unknown"], []),
    ]:
        response = await ada.get(TASKS, params={"tag": wanted, "sort": "title", "count": "exact"})
        assert [task["title"] for task in response.json()["items"]] == found
        assert response.json()["total"] == len(found)
    first = await ada.get(TASKS, params={"tag": ["a", "b"], "limit": 1})
    rest = await ada.get(first.headers["link"].split(">")[0][1:])
    assert [task["title"] for page in (first, rest) for task in page.json()["items"]] == ["abc", "ab"]


async def test_a_tag_from_its_making_to_its_end(api: Api) -> None:
    ada = api.person()
    made = await ada.post(TAGS, {"name": "Home"})
    assert (made.status_code, made.json()) == (201, {"id": made.json()["id"], "name": "Home", "task_count": 0})
    url = f"{TAGS}/{made.json()['id']}"
    again = await ada.post(TAGS, {"name": "HOME"})
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    task, binned, other = await ada.task(tags=["home"]), await ada.task(tags=["home"]), await ada.task(tags=["other"])
    await ada.delete(f"{TASKS}/{binned['id']}")

    renamed = await ada.patch(url, {"name": "at home"})
    assert renamed.json() == {"id": made.json()["id"], "name": "at home", "task_count": 1}
    seen = (await ada.get(f"{TASKS}/{task['id']}")).json()
    assert (seen["tags"], seen["version"]) == (["at home"], 2)
    assert seen["updated_at"] > task["updated_at"]
    for same in {"name": "at home"}, {}:
        assert (await ada.patch(url, same)).json() == renamed.json()
    assert (await ada.get(f"{TASKS}/{task['id']}")).json()["version"] == 2
    taken = await ada.patch(url, {"name": "OTHER"})
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")

    assert (await ada.delete(url)).status_code == 204
    seen = (await ada.get(f"{TASKS}/{task['id']}")).json()
    assert (seen["tags"], seen["version"]) == ([], 3)
    assert (await ada.post(f"{TASKS}/{binned['id']}/restore")).json()["version"] == 5
    assert (await ada.get(f"{TASKS}/{other['id']}")).json() == other
    for method, body in ("PATCH", {"name": "x"}), ("PATCH", {}), ("DELETE", None):
        assert (await ada.request(method, url, json=body)).status_code == 404


@pytest.mark.parametrize("name", ["", " ", "x" * 51, "nul\0", None, 5, "\u3164"], ids=repr)
async def test_what_is_not_a_name_is_a_422(api: Api, name: Any) -> None:
    ada = api.person()
    tag = (await ada.post(TAGS, {"name": "x"})).json()
    task = await ada.task()
    for response, loc in [
        (await ada.post(TAGS, {"name": name}), ["body", "name"]),
        (await ada.patch(f"{TAGS}/{tag['id']}", {"name": name}), ["body", "name"]),
        (await ada.post(TASKS, {"title": "x", "tags": ["fine", name]}), ["body", "tags", 1]),
        (await ada.patch(f"{TASKS}/{task['id']}", {"tags": [name]}), ["body", "tags", 0]),
    ]:
        assert response.status_code == 422
        assert response.json()["errors"][0]["loc"] == loc


async def test_a_task_has_at_most_twenty(api: Api) -> None:
    ada = api.person()
    assert len((await ada.task(tags=[f"{number}" for number in range(20)]))["tags"]) == 20
    assert (await ada.post(TASKS, {"title": "x", "tags": [f"{number}" for number in range(21)]})).status_code == 422


async def test_writers_at_once_lose_nothing(api: Api) -> None:
    """The same new tag by all, on tasks of their own; then different tags on one task, of which the last set stays."""
    ada = api.person()
    await ada.task()
    made = await asyncio.gather(*(ada.task(f"{n}", tags=["shared", f"own {n}"]) for n in range(15)))
    assert all(len(task["tags"]) == 2 for task in made)
    assert (await tags(ada))["shared"] == 15
    url = f"{TASKS}/{made[0]['id']}"
    writes = [ada.patch(url, {"tags": [f"x{n}", f"y{n}"]}) for n in range(10)]
    puts = [ada.put(url, {"title": "t", "tags": [f"x{n}", f"y{n}"]}) for n in range(10, 20)]
    answers = await asyncio.gather(*writes, *puts)
    assert sorted(answer.json()["version"] for answer in answers) == list(range(2, 22))
    last = max(answers, key=lambda answer: answer.json()["version"]).json()
    assert (await ada.get(url)).json() == last
    assert last["tags"][0][1:] == last["tags"][1][1:]


async def test_a_tag_deleted_while_it_is_given_leaves_no_trace_or_is_made_anew(api: Api) -> None:
    ada = api.person()
    task = await ada.task(tags=["t"])
    url = f"{TASKS}/{task['id']}"
    for _ in range(10):
        await ada.patch(url, {"tags": ["t"]})
        await asyncio.gather(
            ada.delete(f"{TAGS}/{await tag_id(ada, 't')}"), *(ada.patch(url, {"tags": ["t"]}) for _ in range(3))
        )
        assert (await ada.get(url)).json()["tags"] == [name for name, count in (await tags(ada)).items() if count]


async def test_a_new_task_without_tags_has_none(api: Api) -> None:
    """Whatever tags its owner's other tasks have, and by whichever way it is made."""
    ada = api.person()
    await ada.task(tags=["home", "work"])
    made = [await ada.task(), await ada.task(tags=[]), (await ada.put(f"{TASKS}/{uuid4()}", {"title": "a"})).json()]
    batch = await ada.post(f"{TASKS}/batch", {"operations": [{"op": "create", "task": {"title": "a"}}]})
    assert [task["tags"] for task in [*made, *batch.json()["items"]]] == [[]] * 4
