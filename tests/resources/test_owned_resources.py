"""Guarantees of every resource that belongs to a user. A line in `RESOURCES` tests a new resource."""

import asyncio
import re
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Uuid, bindparam, delete, func, literal_column, select, update
from sqlmodel import SQLModel

from backend.database import SYSTEM, Database, Row, Statement, Transaction
from backend.resources.retention import purge
from backend.sync.changes import LOCK_CHANGES
from backend.users import lifecycle
from tests.conftest import Api, Person
from tests.support.following import Copy, reading
from tests.support.isolation import forgotten_filter, owned_insert, owner_filter


@dataclass(frozen=True)
class Resource:
    """A resource at /api/v1/NAME, in the folder and the table NAME.

    `new`: the body that creates a row. `change`: members for PATCH, each with another value than in a new row.
    `linked`: the member with names of labels, and the name of their table; `new` has some.
    """

    name: str
    new: dict[str, Any]
    change: dict[str, Any]
    linked: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str:
        return f"/api/v1/{self.name}"

    @property
    def statements(self) -> list[ModuleType]:
        names = [f"backend.{self.name}.{name}" for name in ("statements", "listing")]
        return [import_module(name) for name in names if find_spec(name)]


RESOURCES = [
    Resource(
        "tasks",
        new={"title": "a", "tags": ["x", "y"]},
        change={"title": "b", "priority": "high", "tags": ["z"]},
        linked="tags",
    ),
]


@pytest.fixture(params=RESOURCES, ids=str)
def resource(request: pytest.FixtureRequest) -> Resource:
    found: Resource = request.param
    return found


async def make(person: Person, resource: Resource, number: int = 1) -> list[dict[str, Any]]:
    answers = [await person.post(resource.path, resource.new) for _ in range(number)]
    assert [answer.status_code for answer in answers] == [201] * number, answers[-1].text
    return [answer.json() for answer in answers]


async def owned(person: Person, resource: Resource) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await person.get(resource.path, params={"limit": 100})).json()["items"]
    return items


def problem_of(answer: Any) -> tuple[int, str]:
    """Status and code of a problem."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == answer.status_code
    assert problem["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, problem["code"]


async def test_an_oauth_access_token_needs_the_scope_of_the_method(api: Api, resource: Resource) -> None:
    read, write = f"{resource.name}:read", f"{resource.name}:write"
    ada = api.person()
    for scope, allowed in ((read, ["GET"]), (write, ["POST"]), (f"{read} {write}", ["GET", "POST"]), ("openid", [])):
        bearer = {"Authorization": f"Bearer {api.issuer.access_token(sub=ada.subject, scope=scope)}"}
        for method in "GET", "POST":
            json = resource.new if method == "POST" else None
            answer = await api.http.request(method, resource.path, headers=bearer, json=json)
            assert answer.is_success == (method in allowed), (scope, method)
            assert answer.is_success or problem_of(answer) == (403, "insufficient_scope")
    metadata = (await api.http.get("/.well-known/oauth-protected-resource")).json()
    assert {read, write} <= set(metadata["scopes_supported"])


async def test_a_row_is_created_read_changed_and_deleted(api: Api, resource: Resource) -> None:
    ada = api.person()
    made = await ada.post(resource.path, resource.new)
    row = made.json()
    url = f"{resource.path}/{row['id']}"
    assert (made.status_code, made.headers["location"], made.headers["etag"]) == (201, url, '"1"')
    assert resource.new.items() <= row.items()
    assert await owned(ada, resource) == [row]
    found = await ada.get(url)
    assert (found.status_code, found.headers["etag"], found.json()) == (200, '"1"', row)
    assert found.headers["cache-control"] == "private, no-cache"

    changed = await ada.patch(url, resource.change)
    assert (changed.status_code, changed.headers["etag"]) == (200, '"2"')
    after = changed.json()
    assert after == {**row, **resource.change, "version": 2, "updated_at": after["updated_at"]}
    assert after["updated_at"] > row["updated_at"]
    for nothing in {}, resource.change:
        again = await ada.patch(url, nothing)
        assert (again.status_code, again.headers["etag"], again.json()) == (200, '"2"', after)

    gone = await ada.delete(url)
    assert (gone.status_code, gone.content) == (204, b"")
    assert problem_of(await ada.get(url)) == problem_of(await ada.patch(url, {})) == (404, "not_found")
    assert await owned(ada, resource) == []


async def test_conditional_requests_compare_the_version(api: Api, resource: Resource) -> None:
    ada = api.person()
    (row,) = await make(ada, resource)
    url = f"{resource.path}/{row['id']}"
    for known, status in {'"1"': 304, 'W/"1"': 304, '"7", "1"': 304, "*": 304, '"2"': 200}.items():
        answer = await ada.get(url, headers={"If-None-Match": known})
        assert (answer.status_code, answer.headers["etag"]) == (status, '"1"'), known
        assert bool(answer.content) == (status == 200)
    for stale in '"2"', 'W/"1"', '"nonsense"':
        for method in "PATCH", "DELETE":
            json = resource.change if method == "PATCH" else None
            answer = await ada.request(method, url, json=json, headers={"If-Match": stale})
            assert problem_of(answer) == (412, "stale_version"), (method, stale)
            missing = await ada.request(method, f"{resource.path}/{uuid4()}", json=json, headers={"If-Match": stale})
            assert problem_of(missing) == (404, "not_found")
    assert await owned(ada, resource) == [row]
    race = await asyncio.gather(*(ada.patch(url, resource.change, headers={"If-Match": '"1"'}) for _ in range(5)))
    assert sorted(answer.status_code for answer in race) == [200, 412, 412, 412, 412]
    assert (await ada.delete(url, headers={"If-Match": '"2"'})).status_code == 204


async def test_an_invalid_request_is_refused_and_changes_nothing(api: Api, resource: Resource) -> None:
    ada = api.person()
    (row,) = await make(ada, resource)
    url = f"{resource.path}/{row['id']}"
    for method, path in ("POST", resource.path), ("PATCH", url):
        base = resource.new if method == "POST" else {}
        for name in "nonsense", "owner_id", "id", "version":
            answer = await ada.request(method, path, json={**base, name: str(uuid4())})
            assert problem_of(answer) == (422, "invalid")
            assert [error["loc"] for error in answer.json()["errors"]] == [["body", name]]
        for name, value in resource.new.items():
            if isinstance(value, str):
                answer = await ada.request(method, path, json={**base, name: "a\0b"})
                assert problem_of(answer) == (422, "invalid")
        assert problem_of(await ada.request(method, path, content=b"{", headers=JSON)) == (422, "invalid_json")
        assert problem_of(await ada.request(method, path, content=b"{}", headers=FORM)) == (
            415,
            "unsupported_media_type",
        )
    answer = await ada.get(resource.path, params={"owner_id": str(uuid4())})
    assert [error["loc"] for error in answer.json()["errors"]] == [["query", "owner_id"]]
    assert problem_of(await ada.get(f"{resource.path}/1")) == (404, "not_found")
    assert await owned(ada, resource) == [row]


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


async def test_pages_in_every_order_are_complete_and_cursors_are_bound_to_it(api: Api, resource: Resource) -> None:
    ada, eve = api.person(), api.person()
    made = [row["id"] for row in await make(ada, resource, 5)]
    parameters = api.app.openapi()["paths"][resource.path]["get"]["parameters"]
    (sorts,) = (parameter["schema"]["enum"] for parameter in parameters if parameter["name"] == "sort")
    cursors = {}
    for sort in sorts:
        whole = (await ada.get(resource.path, params={"sort": sort})).json()
        assert whole["next_cursor"] is None
        url, walked = f"{resource.path}?limit=2&sort={sort}", []
        while True:
            page = await ada.get(url)
            walked += page.json()["items"]
            if page.json()["next_cursor"] is None:
                break
            cursors[sort] = page.json()["next_cursor"]
            link = re.fullmatch(r'<(/.*)>; rel="next"', page.headers["link"])
            assert link is not None
            url = link[1]
        assert "link" not in page.headers
        assert walked == whole["items"]
        assert {row["id"] for row in walked} == set(made)
    assert [row["id"] for row in await owned(ada, resource)] == made[::-1]
    for sort, cursor in cursors.items():
        (another,) = [name for name in sorts if name != sort][:1]
        answer = await ada.get(resource.path, params={"sort": another, "cursor": cursor})
        assert problem_of(answer) == (422, "invalid_cursor")
        assert (await eve.get(resource.path, params={"sort": sort, "cursor": cursor})).json()["items"] == []
    for cursor in "", "x", "bnVsbA", "A" * 999:
        answer = await ada.get(resource.path, params={"cursor": cursor})
        assert problem_of(answer) == (422, "invalid_cursor")


def comparable(answer: Any) -> Any:
    """Everything in a response that does not differ between any two responses."""
    body = answer.json() if answer.content else None
    if isinstance(body, dict):
        body.pop("request_id", None)
    return answer.status_code, body, {name: value for name, value in answer.headers.items() if name != "x-request-id"}


@pytest.mark.parametrize("has_owner_filter", [True, False], ids=["filtered", "unfiltered"])
async def test_users_cannot_see_change_or_detect_rows_of_others(
    api: Api, resource: Resource, has_owner_filter: bool
) -> None:
    """Although they know the ids, and also where the statements lack the owner filter."""
    people = api.person(), api.person()
    with nullcontext() if has_owner_filter else forgotten_filter(*resource.statements):
        rows = await asyncio.gather(*(make(person, resource, 3) for person in people))

        async def trespass(person: Person, others: list[dict[str, Any]]) -> None:
            for row in others:
                for method, json, headers in (
                    ("GET", None, {}),
                    ("GET", None, {"If-None-Match": '"1"'}),
                    ("PATCH", resource.change, {}),
                    ("PATCH", {}, {"If-Match": '"1"'}),
                    ("PATCH", resource.change, {"If-Match": '"9"'}),
                    ("DELETE", None, {"If-Match": "*"}),
                    ("DELETE", None, {}),
                ):
                    of_another, unknown = [
                        await person.request(method, f"{resource.path}/{id}", json=json, headers=headers)
                        for id in (row["id"], uuid4())
                    ]
                    assert of_another.status_code == 404, (method, headers)
                    assert comparable(of_another) == comparable(unknown), (method, headers)

        await asyncio.gather(*(trespass(*pair) for pair in zip(people, rows[::-1], strict=True)))
        for person, own in zip(people, rows, strict=True):
            assert await owned(person, resource) == own[::-1]
            assert await Copy(person, path=resource.path).sync() == own


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Statement]:
    """The statements that the test executes as a user."""
    found: list[Statement] = []

    def recording(original: Any) -> Any:
        async def rows(self: Any, statement: Statement, **values: object) -> list[Row]:
            if self._actor != SYSTEM:
                found.append(statement)
            rows: list[Row] = await original(self, statement, **values)
            return rows

        return rows

    monkeypatch.setattr(Database, "rows", recording(Database.rows))
    monkeypatch.setattr(Transaction, "rows", recording(Transaction.rows))
    return found


async def test_every_statement_is_scoped_to_the_caller(api: Api, resource: Resource, executed: list[Statement]) -> None:
    """Row-level security would hide a missing filter."""
    ada = api.person()
    rows = await make(ada, resource, 3)
    page = (await ada.get(resource.path, params={"limit": 1})).json()
    await ada.get(resource.path, params={"cursor": page["next_cursor"]})
    for id in rows[0]["id"], uuid4():
        await ada.get(f"{resource.path}/{id}")
        for if_match in '"9"', "*":
            await ada.patch(f"{resource.path}/{id}", resource.change, headers={"If-Match": if_match})
            await ada.delete(f"{resource.path}/{id}", headers={"If-Match": if_match})
    assert len(set(executed)) >= 6
    for statement in set(executed) - {LOCK_CHANGES}:
        sql = statement.sql
        assert owned_insert(statement).match(sql) or owner_filter(statement).search(sql), sql


async def test_a_page_is_one_statement(api: Api, resource: Resource, executed: list[Statement]) -> None:
    ada = api.person()
    for number in 1, 10:
        await make(ada, resource, number)
        executed.clear()
        await owned(ada, resource)
        assert len(executed) == 1


@pytest.mark.parametrize(("end", "left"), [("erased", [0, 2]), ("purged", [0, 2]), ("merged", [0, 4])])
async def test_no_row_outlives_its_account(api: Api, resource: Resource, end: str, left: list[int]) -> None:
    people = api.person(), api.person()
    for person in people:
        await make(person, resource, 2)
    ids = [UUID((await person.get("/api/v1/users/me")).json()["id"]) for person in people]
    system = Database(api.state["pool"], SYSTEM)
    table = SQLModel.metadata.tables[resource.name]
    of_owner = Statement(select(table.c.id).where(table.c.owner_id == bindparam("owner", type_=Uuid)))

    async def work(transaction: Transaction) -> None:
        if end == "erased":
            await lifecycle.erase(transaction, ids[0])
        elif end == "merged":
            assert await lifecycle.merge(transaction, *ids)
        else:
            await lifecycle.purge(transaction, ids[0], datetime.now(UTC))

    await system.transact(work)
    assert [len(await system.rows(of_owner, owner=id)) for id in ids] == left


async def test_a_copy_receives_changes_until_its_token_expires(api: Api, resource: Resource) -> None:
    ada, eve = api.person(), api.person()
    early, copy = Copy(ada, path=resource.path), Copy(ada, limit=2, path=resource.path)
    rows = await make(ada, resource, 3)
    await make(eve, resource)
    assert await copy.sync() == rows
    await early.sync()
    urls = [f"{resource.path}/{row['id']}" for row in rows]
    changed = (await ada.patch(urls[0], resource.change)).json()
    await ada.delete(urls[1])
    changes = await copy.sync()
    assert changes[0] == changed
    assert [(row["id"], row["version"], row["deleted_at"] is None) for row in changes[1:]] == [
        (rows[1]["id"], 2, False)
    ]
    assert copy.rows == {row["id"]: row for row in await owned(ada, resource)}
    await ada.patch(urls[0], resource.change)
    assert await copy.sync() == []
    # Tombstones are purged after 30 days; a copy without them must restart.
    system, id = Database(api.state["pool"], SYSTEM), UUID((await ada.get("/api/v1/users/me")).json()["id"])
    table = SQLModel.metadata.tables[resource.name]
    mine = table.c.owner_id == bindparam("owner", type_=Uuid)
    a_month_ago = func.now() - literal_column("interval '30 days'")
    age = update(table).where(mine, table.c.deleted_at.is_not(None)).values(deleted_at=a_month_ago)
    await system.rows(Statement(age), owner=id)
    before_the_purge = await copy.refusal()  # `copy` has the tombstone, but not the update that made it old
    await purge(api.state["pool"])
    assert len(await system.rows(Statement(select(table.c.id).where(mine)), owner=id)) == 2
    assert before_the_purge == await early.refusal() == (410, "sync_token_expired")
    copy.restart()
    assert {row["id"] for row in await copy.sync()} == {rows[0]["id"], rows[2]["id"]}


async def test_a_stream_sends_only_changes_of_its_resource(
    api: Api, resource: Resource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One poll serves the streams of all resources."""
    monkeypatch.setattr(api.state["broker"], "period", 0.01)
    ada = api.person()
    order = [resource, *(each for each in RESOURCES if each is not resource)]
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(reading(api, ada, path=each.path)) for each in order]
        made = [(await make(ada, each))[0] for each in order]
        assert [(await reader.next()).data for reader in readers] == made
        await ada.delete(f"{resource.path}/{made[0]['id']}")
        event = await readers[0].next()
        assert event.data["deleted_at"]
        await readers[0].close()
        followed = {name for owner in api.state["broker"]._owners.values() for name in owner.channels}
        assert followed == {each.name for each in order[1:]}, "the broker still reads for a closed stream"
    (last,) = await make(ada, resource)
    assert await Copy(ada, path=resource.path, token=event.id).sync() == [last]
    async with reading(api, ada, event.id, path=resource.path) as reader:
        assert (await reader.next()).data == last


async def test_a_merge_of_accounts_is_in_the_feed_and_the_stream(
    api: Api, resource: Resource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.state["broker"], "period", 0.01)
    people = api.person(), api.person()
    moving = {row["id"] for row in await make(people[0], resource, 2)}
    await make(people[1], resource)
    ids = [UUID((await person.get("/api/v1/users/me")).json()["id"]) for person in people]
    copy = Copy(people[1], path=resource.path)
    await copy.sync()
    async with reading(api, people[1], path=resource.path) as reader:
        await Database(api.state["pool"], SYSTEM).transact(lambda transaction: lifecycle.merge(transaction, *ids))
        assert {(await reader.next()).data["id"] for _ in moving} == moving
    assert {row["id"] for row in await copy.sync()} == moving
    assert copy.rows == {row["id"]: row for row in await owned(people[1], resource)}


LINKED = [resource for resource in RESOURCES if resource.linked]


@pytest.mark.parametrize("resource", LINKED, ids=str)
async def test_renamed_and_deleted_labels_make_new_versions(api: Api, resource: Resource) -> None:
    ada, eve = api.person(), api.person()
    assert resource.linked is not None
    labels = SQLModel.metadata.tables[resource.linked]
    rows, others = await make(ada, resource, 2), await make(eve, resource)
    bare = (await ada.post(resource.path, {**resource.new, resource.linked: []})).json()
    copy = Copy(ada, path=resource.path)
    await copy.sync()
    first, *rest = resource.new[resource.linked]
    one = (labels.c.owner_id == bindparam("owner", type_=Uuid), labels.c.name == bindparam("label"))
    system, id = Database(api.state["pool"], SYSTEM), UUID((await ada.get("/api/v1/users/me")).json()["id"])
    rename, remove = update(labels).where(*one).values(name=bindparam("new")), delete(labels).where(*one)
    await system.rows(Statement(rename), owner=id, label=first, new="~")
    renamed = await copy.sync()
    assert [(row[resource.linked], row["version"]) for row in renamed] == [([*rest, "~"], 2)] * len(rows)
    await system.rows(Statement(remove), owner=id, label="~")
    shown = {row["id"]: (row[resource.linked], row["version"]) for row in await copy.sync()}
    assert shown == {row["id"]: (rest, 3) for row in rows}
    assert copy.rows == {row["id"]: row for row in await owned(ada, resource)}
    assert copy.rows[bare["id"]] == bare
    assert await owned(eve, resource) == others


async def test_null_restores_the_default(api: Api, resource: Resource) -> None:
    ada = api.person()
    (row,) = await make(ada, resource)
    url = f"{resource.path}/{row['id']}"
    for name in resource.change:
        rest = {member: value for member, value in resource.new.items() if member != name}
        without = await ada.post(resource.path, rest)
        await ada.patch(url, resource.change)
        cleared = await ada.patch(url, {name: None})
        if without.status_code == 422:  # there is no default
            assert problem_of(cleared) == (422, "invalid")
        else:
            assert cleared.json()[name] == without.json()[name]


async def test_conditional_requests_are_documented(api: Api, resource: Resource) -> None:
    """`tests/contract/test_openapi.py` tests the rest of the documentation."""
    document = api.app.openapi()
    assert resource.name in {tag["name"] for tag in document["tags"] if tag["description"]}
    paths = document["paths"]
    collection, one = paths[resource.path], paths[f"{resource.path}/{{id}}"]
    for method, status in ("get", "304"), ("patch", "412"), ("delete", "412"):
        assert status in one[method]["responses"]
    for operation, status in (one["get"], "200"), (one["patch"], "200"), (collection["post"], "201"):
        assert "ETag" in operation["responses"][status]["headers"]
