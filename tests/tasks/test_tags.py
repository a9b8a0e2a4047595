"""Tags: created on first use, unique by case-folded name, consistent under concurrent writes."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import Api, Person

TASKS = "/api/v1/tasks"
TAGS = "/api/v1/tags"


async def tags(person: Person) -> dict[str, int]:
    """The count of tasks by name, in the order of the response."""
    response = await person.get(TAGS)
    assert response.status_code == 200
    return {tag["name"]: tag["task_count"] for tag in response.json()["items"]}


async def tag_id(person: Person, name: str) -> str:
    ids: list[str] = [tag["id"] for tag in (await person.get(TAGS)).json()["items"] if tag["name"] == name]
    return ids[0]


async def test_a_task_has_tags_in_the_spelling_first_stored(api: Api) -> None:
    ada = api.person()
    task = await ada.task(tags=["work", "Home", "HOME"])
    assert task["tags"] == ["Home", "work"]
    other = await ada.task(tags=["home", "Straße"])
    assert other["tags"] == ["Home", "Straße"]
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
        pytest.param({"tags": ["b", "a"]}, ["a", "b"], False, id="another order"),
        pytest.param({"tags": ["A", "B", "b"]}, ["a", "b"], False, id="another case"),
        pytest.param({"title": "other"}, ["a", "b"], True, id="title only"),
        pytest.param({"tags": ["a"]}, ["a"], True, id="remove"),
        pytest.param({"tags": ["c", "a"]}, ["a", "c"], True, id="replace"),
        pytest.param({"tags": []}, [], True, id="empty"),
        pytest.param({"tags": None}, [], True, id="null"),
        pytest.param({"tags": ["a", "b"], "title": "other"}, ["a", "b"], True, id="title and equal tags"),
    ],
)
async def test_patch_replaces_the_tags(api: Api, patch: dict[str, Any], after: list[str], changed: bool) -> None:
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


async def test_put_replaces_the_tags(api: Api) -> None:
    ada = api.person()
    url = f"{TASKS}/{uuid4()}"
    created = await ada.put(url, {"title": "x", "tags": ["b", "a"]})
    assert (created.status_code, created.json()["tags"]) == (201, ["a", "b"])
    same = await ada.put(url, {"title": "x", "tags": ["A", "B"]})
    assert (same.status_code, same.json()) == (200, created.json())
    for headers in {}, {"If-Match": "*"}:
        assert (await ada.put(url, {"title": "x", "tags": ["c"]}, headers=headers)).json()["tags"] == ["c"]
        assert (await ada.put(url, {"title": "x"}, headers=headers)).json()["tags"] == []
    assert (await ada.get(url)).json()["version"] == 5
    missing = await ada.patch(f"{TASKS}/{uuid4()}", {"tags": ["never"]})
    assert missing.status_code == 404
    assert await tags(ada) == {"a": 0, "b": 0, "c": 0}


async def test_a_list_can_be_filtered_by_all_of_several_tags(api: Api) -> None:
    ada, eve = api.person(), api.person()
    await eve.task("eve's", tags=["a", "b"])
    for title, names in {"none": [], "a": ["a"], "b": ["b"], "ab": ["a", "b"], "abc": ["a", "b", "c"]}.items():
        await ada.task(title, tags=names)
    for wanted, expected in [
        (["a"], ["a", "ab", "abc"]),
        (["A", "b"], ["ab", "abc"]),
        (["a", "A"], ["a", "ab", "abc"]),
        (["a", "b", "c"], ["abc"]),
        (["a", "unknown"], []),
    ]:
        response = await ada.get(TASKS, params={"tag": wanted, "sort": "title", "count": "exact"})
        assert [task["title"] for task in response.json()["items"]] == expected
        assert response.json()["total"] == len(expected)
    first = await ada.get(TASKS, params={"tag": ["a", "b"], "limit": 1})
    rest = await ada.get(first.headers["link"].split(">")[0][1:])
    assert [task["title"] for page in (first, rest) for task in page.json()["items"]] == ["abc", "ab"]


async def test_a_tag_can_be_created_renamed_and_deleted(api: Api) -> None:
    ada = api.person()
    created = await ada.post(TAGS, {"name": "Home"})
    assert (created.status_code, created.json()) == (201, {"id": created.json()["id"], "name": "Home", "task_count": 0})
    url = f"{TAGS}/{created.json()['id']}"
    again = await ada.post(TAGS, {"name": "HOME"})
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    task, trashed, other = await ada.task(tags=["home"]), await ada.task(tags=["home"]), await ada.task(tags=["other"])
    await ada.delete(f"{TASKS}/{trashed['id']}")

    renamed = await ada.patch(url, {"name": "at home"})
    assert renamed.json() == {"id": created.json()["id"], "name": "at home", "task_count": 1}
    seen = (await ada.get(f"{TASKS}/{task['id']}")).json()
    assert (seen["tags"], seen["version"]) == (["at home"], 2)
    assert seen["updated_at"] > task["updated_at"]
    for unchanged in {"name": "at home"}, {}:
        assert (await ada.patch(url, unchanged)).json() == renamed.json()
    assert (await ada.get(f"{TASKS}/{task['id']}")).json()["version"] == 2
    taken = await ada.patch(url, {"name": "OTHER"})
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")

    assert (await ada.delete(url)).status_code == 204
    seen = (await ada.get(f"{TASKS}/{task['id']}")).json()
    assert (seen["tags"], seen["version"]) == ([], 3)
    assert (await ada.post(f"{TASKS}/{trashed['id']}/restore")).json()["version"] == 5
    assert (await ada.get(f"{TASKS}/{other['id']}")).json() == other
    for method, body in ("PATCH", {"name": "x"}), ("PATCH", {}), ("DELETE", None):
        assert (await ada.request(method, url, json=body)).status_code == 404


@pytest.mark.parametrize("name", ["", " ", "x" * 51, "nul\0", None], ids=["empty", "blank", "long", "NUL", "null"])
async def test_an_invalid_name_is_a_422(api: Api, name: Any) -> None:
    ada = api.person()
    tag = (await ada.post(TAGS, {"name": "x"})).json()
    task = await ada.task()
    for response, loc in [
        (await ada.post(TAGS, {"name": name}), ["body", "name"]),
        (await ada.patch(f"{TAGS}/{tag['id']}", {"name": name}), ["body", "name"]),
        (await ada.post(TASKS, {"title": "x", "tags": ["valid", name]}), ["body", "tags", 1]),
        (await ada.patch(f"{TASKS}/{task['id']}", {"tags": [name]}), ["body", "tags", 0]),
    ]:
        assert response.status_code == 422
        assert response.json()["errors"][0]["loc"] == loc


async def test_a_task_has_at_most_20_tags(api: Api) -> None:
    ada = api.person()
    assert len((await ada.task(tags=[f"{number}" for number in range(20)]))["tags"]) == 20
    assert (await ada.post(TASKS, {"title": "x", "tags": [f"{number}" for number in range(21)]})).status_code == 422


async def test_concurrent_writes_of_tags_are_serialized(api: Api) -> None:
    """First of the same new tag on different tasks, then of different tags on one task."""
    ada = api.person()
    await ada.task()
    tasks = await asyncio.gather(*(ada.task(f"{n}", tags=["shared", f"own {n}"]) for n in range(15)))
    assert all(len(task["tags"]) == 2 for task in tasks)
    assert (await tags(ada))["shared"] == 15
    url = f"{TASKS}/{tasks[0]['id']}"
    patches = [ada.patch(url, {"tags": [f"x{n}", f"y{n}"]}) for n in range(10)]
    puts = [ada.put(url, {"title": "t", "tags": [f"x{n}", f"y{n}"]}) for n in range(10, 20)]
    responses = await asyncio.gather(*patches, *puts)
    assert sorted(response.json()["version"] for response in responses) == list(range(2, 22))
    last = max(responses, key=lambda response: response.json()["version"]).json()
    assert (await ada.get(url)).json() == last
    assert last["tags"][0][1:] == last["tags"][1][1:]


async def test_a_tag_deleted_during_its_use_is_gone_or_created_again(api: Api) -> None:
    ada = api.person()
    task = await ada.task(tags=["t"])
    url = f"{TASKS}/{task['id']}"
    for _ in range(10):
        await ada.patch(url, {"tags": ["t"]})
        await asyncio.gather(
            ada.delete(f"{TAGS}/{await tag_id(ada, 't')}"), *(ada.patch(url, {"tags": ["t"]}) for _ in range(3))
        )
        assert (await ada.get(url)).json()["tags"] == [name for name, count in (await tags(ada)).items() if count]


async def test_a_task_created_without_tags_has_none(api: Api) -> None:
    """By POST, PUT and a batch, for an owner whose other tasks have tags."""
    ada = api.person()
    await ada.task(tags=["home", "work"])
    tasks = [await ada.task(), await ada.task(tags=[]), (await ada.put(f"{TASKS}/{uuid4()}", {"title": "a"})).json()]
    batch = await ada.post(f"{TASKS}/batch", {"operations": [{"op": "create", "task": {"title": "a"}}]})
    assert [task["tags"] for task in [*tasks, *batch.json()["items"]]] == [[]] * 4
