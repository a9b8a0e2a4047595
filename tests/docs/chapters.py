"""What the notes of docs/adding-a-resource.md do after each chapter. `test_adding_a_resource.py` runs it in a copy."""

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import update
from sqlmodel import col

from backend.database import Actor, Database, Statement
from backend.resources.models import CALLER
from tests.conftest import Api, Person
from tests.support.following import Copy

PATH = "/api/v1/notes"


async def make(person: Person, **members: Any) -> dict[str, Any]:
    made = await person.post(PATH, {"title": "Wi-Fi", **members})
    assert made.status_code == 201, made.text
    note: dict[str, Any] = made.json()
    return note


async def code_of(person: Person, method: str = "POST", path: str = PATH, **options: Any) -> tuple[int, str]:
    answer = await person.request(method, path, **options)
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return answer.status_code, answer.json()["code"]


async def test_the_smallest_resource(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from backend.notes import statements  # type: ignore[import-not-found, unused-ignore]  # only in the copy

    from tests.support.isolation import forgotten_filter

    ada, eve = api.person(), api.person()
    note = await make(ada, body="b")
    assert {**note, "id": ""} == {"id": "", "title": "Wi-Fi", "body": "b", "pinned": False}
    assert (await ada.get(PATH)).json() == [note]
    with forgotten_filter(statements):
        assert (await eve.get(PATH)).json() == []
        assert (await ada.get(PATH)).json() == [note]
    assert (await api.http.post(PATH, content=b"{")).status_code == 401
    assert await code_of(ada, json={"title": "x" * 201}) == (422, "invalid")
    assert await code_of(ada, json={"title": "a\0b"}) == (422, "invalid_value")
    assert await code_of(ada, content=b"x" * 100_000) == (415, "unsupported_media_type")
    monkeypatch.setattr(ada, "bearer", {"Authorization": f"Bearer {api.issuer.access_token(sub=ada.subject)}"})
    assert await code_of(ada) == (403, "forbidden")


async def test_permissions(api: Api) -> None:
    ada = api.person()
    for scope, allowed in ("notes:read", "GET"), ("notes:write", "POST"):
        ada.bearer = {"Authorization": f"Bearer {api.issuer.access_token(sub=ada.subject, scope=scope)}"}
        for method in "GET", "POST":
            answer = await ada.request(method, PATH, json={"title": "a"} if method == "POST" else None)
            assert answer.is_success is (method == allowed)


async def test_updates_with_etags(api: Api) -> None:
    ada = api.person()
    url = f"{PATH}/{(await make(ada))['id']}"
    changed = await ada.patch(url, {"pinned": True}, headers={"If-Match": '"1"'})
    assert (changed.status_code, changed.headers["etag"]) == (200, '"2"')
    for method in "PATCH", "DELETE":
        json = {"title": "x"} if method == "PATCH" else None
        assert await code_of(ada, method, url, json=json, headers={"If-Match": '"1"'}) == (412, "stale_version")
        assert await code_of(api.person(), method, url, json=json) == (404, "not_found")
    assert (await ada.get(url, headers={"If-None-Match": '"2"'})).status_code == 304
    assert (await ada.get(PATH)).json()["items"] == [changed.json()]
    assert (await ada.delete(url)).status_code == 204
    assert await code_of(ada, "GET", url) == (404, "not_found")


async def test_pages_and_filters(api: Api) -> None:
    ada = api.person()
    notes = [await make(ada, title=f"{number}", pinned=number == 1) for number in range(3)]
    first = (await ada.get(PATH, params={"limit": 2, "sort": "created_at"})).json()
    second = (await ada.get(PATH, params={"limit": 2, "sort": "created_at", "cursor": first["next_cursor"]})).json()
    assert first["items"] + second["items"] == notes
    assert (await ada.get(PATH, params={"pinned": "true"})).json()["items"] == [notes[1]]


async def test_search(api: Api) -> None:
    ada = api.person()
    notes = [await make(ada, title="FUSSBALL"), await make(ada, body="am Fußballplatz"), await make(ada)]
    for text, found in {"fußball": notes[:2], "wi-fi": notes[1:], "%": []}.items():
        answer = (await ada.get(PATH, params={"q": text, "sort": "created_at"})).json()
        assert answer["items"] == found, text


async def test_sync(api: Api) -> None:
    ada = api.person()
    copy = Copy(ada, path=PATH)
    note = await make(ada)
    assert await copy.sync() == [note]
    await ada.delete(f"{PATH}/{note['id']}")
    assert [each["id"] for each in await copy.sync() if each["deleted_at"]] == [note["id"]]


async def test_many_to_many(api: Api) -> None:
    from backend.notes.models import Label  # type: ignore[import-not-found, unused-ignore]  # only in the copy

    ada = api.person()
    copy = Copy(ada, path=PATH)
    note = await make(ada, labels=["Home", "HOME", "garden"])
    assert note["labels"] == ["garden", "Home"]
    other = await make(ada, labels=["home"])
    assert (await ada.get(PATH, params={"label": ["home", "garden"]})).json()["items"] == [note]
    await copy.sync()
    id = UUID((await ada.get("/api/v1/users/me")).json()["id"])
    rename = update(Label).where(col(Label.owner_id) == CALLER, col(Label.folded) == "home").values(name="x")
    await Database(api.state["pool"], Actor.user(id)).rows(Statement(rename))
    assert {each["id"]: (each["labels"], each["version"]) for each in await copy.sync()} == {
        note["id"]: (["garden", "x"], 2),
        other["id"]: (["x"], 2),
    }
    cleared = await ada.patch(f"{PATH}/{note['id']}", {"labels": None})
    assert cleared.json()["labels"] == []
