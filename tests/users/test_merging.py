"""Merging two accounts: nothing is lost or duplicated, and the later change wins."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import CheckConstraint, Column, ForeignKeyConstraint, Index, Integer, MetaData, Table, text
from sqlalchemy.schema import SchemaItem

from backend.database import SYSTEM, Database, Transaction
from backend.users import lifecycle, owned_data
from tests.conftest import ISSUER, Api, Person
from tests.database.test_executor import raw
from tests.users.test_lifecycle import NOW, as_system, count_rows, create_data, id_of, row_of, until_blocked

ME = "/api/v1/users/me"
TASKS = "/api/v1/tasks"
TAGS = "/api/v1/tags"


async def merge(api: Api, old: Person, new: Person) -> None:
    async def work(transaction: Transaction) -> None:
        source, target = [await lifecycle.ensure(transaction, ISSUER, person.subject) for person in (old, new)]
        await lifecycle.merge(transaction, source["id"], target["id"])

    await as_system(api, work)
    for person in old, new:
        api.state["users"].invalidate(person.subject)


@dataclass
class Task:
    title: str
    tags: set[str]
    time: int
    version: int
    deleted: bool = False


@dataclass
class Account:
    """A user's data: tasks by id, display names of tags by folded name, stored responses by idempotency key."""

    tasks: dict[str, Task] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def merge(self, other: "Account") -> None:
        """Merge another user's data into this one, as the API is expected to."""
        self.tags = other.tags | self.tags
        self.keys = other.keys | self.keys
        for id, task in other.tasks.items():
            own = self.tasks.get(id)
            if own is None:
                self.tasks[id] = Task(**{**vars(task), "version": task.version + 1})
            elif task.time > own.time:
                version = max(task.version, own.version) + 1
                self.tasks[id] = Task(**{**vars(task), "version": version})


IDS = [str(uuid4()) for _ in range(4)]
NAMES = ["home", "Home", "HOME", "garden", "Straße", "STRASSE"]
STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["put", "put", "put", "patch", "delete", "tag", "key"]),
        st.sampled_from(IDS),
        st.lists(st.sampled_from(NAMES), max_size=2),
    ),
    max_size=14,
)


async def step(person: Person, own: Account, kind: str, id: str, names: list[str], time: int) -> None:
    """Send a request and record its effect in the model."""
    url, title = f"{TASKS}/{id}", f"at {time}"
    match kind:
        case "put":
            response = await person.put(url, {"title": title, "tags": names})
        case "patch":
            response = await person.patch(url, {"title": title})
        case "delete":
            response = await person.delete(url)
            if response.status_code == 204 and not own.tasks[id].deleted:
                own.tasks[id] = Task(**{**vars(own.tasks[id]), "deleted": True, "time": time})
                own.tasks[id].version += 1
            return
        case "tag":
            for name in names:
                if (await person.post(TAGS, {"name": name})).status_code == 201:
                    own.tags[name.casefold()] = name
            return
        case _:
            key = f"key {IDS.index(id) % 2}"
            response = await person.post(TASKS, {"title": "by key"}, headers={"Idempotency-Key": key})
            task = response.json()
            if key not in own.keys:
                own.keys[key] = task["id"]
                own.tasks[task["id"]] = Task("by key", set(), time, 1)
            assert task["id"] == own.keys[key]
            return
    if response.is_success:
        for name in names if kind == "put" else []:
            own.tags.setdefault(name.casefold(), name)
        tags = {name.casefold() for name in names} if kind == "put" else own.tasks[id].tags
        own.tasks[id] = Task(title, tags, time, response.json()["version"])


async def read_account(person: Person) -> Account:
    account = Account()
    for deleted in "false", "true":
        page = (await person.get(TASKS, params={"deleted": deleted, "limit": 100})).json()
        for task in page["items"]:
            tags = {name.casefold() for name in task["tags"]}
            account.tasks[task["id"]] = Task(task["title"], tags, 0, task["version"], deleted == "true")
    account.tags = {tag["name"].casefold(): tag["name"] for tag in (await person.get(TAGS)).json()["items"]}
    return account


def without_times(account: Account) -> tuple[Any, ...]:
    return {id: {**vars(task), "time": 0} for id, task in account.tasks.items()}, account.tags


@given(steps=STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_merge_of_random_accounts_matches_the_model(
    api: Api, steps: list[tuple[int, str, str, list[str]]]
) -> None:
    people, accounts = [api.person(isAnonymous=True), api.person()], [Account(), Account()]
    for time, (user, kind, id, names) in enumerate(steps):
        await step(people[user], accounts[user], kind, id, names, time)
    (old, new), (source, target) = people, accounts
    await merge(api, old, new)
    target.merge(source)
    assert without_times(await read_account(new)) == without_times(target)
    for key, id in target.keys.items():
        again = await new.post(TASKS, {"title": "by key"}, headers={"Idempotency-Key": key})
        assert (again.json()["id"], again.headers["idempotency-replayed"]) == (id, "true")
    assert (await old.get(TASKS)).json()["code"] == "account_purged"


async def test_a_merge_moves_all_rows_and_no_other_users(api: Api) -> None:
    old, new, eve = (api.person() for _ in range(3))
    for person in old, new, eve:
        await create_data(person)
    await old.patch(ME, {"time_zone": "Europe/Berlin", "locale": "de"})
    await new.patch(ME, {"locale": "en"})
    ids = [await id_of(person) for person in (old, new, eve)]
    theirs = await count_rows(api, ids[2])
    await merge(api, old, new)
    assert not any((await count_rows(api, ids[0])).values())
    assert await count_rows(api, ids[2]) == theirs
    me = (await new.get(ME)).json()
    assert (me["id"], me["time_zone"], me["locale"]) == (str(ids[1]), "Europe/Berlin", "en")
    before = await count_rows(api, ids[1])
    await merge(api, old, new)
    assert await count_rows(api, ids[1]) == before


async def test_a_merge_keeps_one_of_two_versions_with_equal_times(api: Api) -> None:
    old, new = api.person(), api.person()
    url = f"{TASKS}/{uuid4()}"
    for person, name in (old, "guest"), (new, "member"):
        await person.put(url, {"title": name, "tags": [name]})
        set_time = raw("UPDATE tasks SET updated_at = '2026-01-01' WHERE owner_id = :id")
        await Database(api.state["pool"], SYSTEM).rows(set_time, id=await id_of(person))
    await merge(api, old, new)
    task = (await new.get(url)).json()
    assert task["tags"] == [task["title"]]


async def test_a_merge_into_the_same_or_a_missing_account_does_nothing(api: Api) -> None:
    ada = api.person()
    await create_data(ada)
    id = await id_of(ada)
    before = await count_rows(api, id)
    for other in id, uuid4():
        await as_system(api, lifecycle.merge, id, other)
        await as_system(api, lifecycle.merge, other, id)
    assert await count_rows(api, id) == before
    assert (await ada.get(ME)).json()["id"] == str(id)


async def test_a_purged_account_receives_nothing(api: Api) -> None:
    old, new = api.person(), api.person()
    await create_data(old)
    id = await id_of(old)
    before = await count_rows(api, id)
    await as_system(api, lifecycle.purge, await id_of(new), NOW)
    await merge(api, old, new)
    assert await count_rows(api, id) == before
    assert (await old.get(ME)).json()["id"] == str(id)
    assert not any((await count_rows(api, (await row_of(api, new.subject))["id"])).values())


@pytest.mark.parametrize("refused_by", ["administrator", "issuer"])
@pytest.mark.parametrize("known", [True, False])
async def test_a_merge_transfers_a_suspension(api: Api, refused_by: str, known: bool) -> None:
    """A ban becomes a suspension, which an administrator can end: Better Auth has not banned the new account."""
    guest, ada = api.person(isAnonymous=True), api.person()
    await guest.task("kept")
    if known:
        await id_of(ada)
    if refused_by == "administrator":
        await as_system(api, lifecycle.set_suspended, await id_of(guest), True)
    else:
        await as_system(api, lifecycle.set_banned, await id_of(guest), True, NOW)
    await merge(api, guest, ada)
    assert (await ada.get(TASKS)).json()["code"] == "account_suspended"
    row = await row_of(api, ada.subject)
    assert (row["suspended_here"], row["banned"]) == (True, False)
    await as_system(api, lifecycle.set_banned, row["id"], False, datetime.now(UTC))
    assert (await row_of(api, ada.subject))["status"] == "suspended"
    entries = raw("SELECT source, action, user_id, details FROM audit_log WHERE subject = :subject")
    assert await Database(api.state["pool"], SYSTEM).rows(entries, subject=ada.subject) == [
        {"source": "event", "action": "suspend", "user_id": row["id"], "details": {"merged_from": guest.subject}}
    ]
    await as_system(api, lifecycle.set_suspended, row["id"], False)
    api.state["users"].invalidate(ada.subject)
    assert [task["title"] for task in (await ada.get(TASKS)).json()["items"]] == ["kept"]


async def test_a_suspended_account_stays_suspended_after_a_merge_into_it(api: Api) -> None:
    guest, ada = api.person(isAnonymous=True), api.person()
    await guest.task()
    await as_system(api, lifecycle.set_suspended, await id_of(ada), True)
    await merge(api, guest, ada)
    assert (await ada.get(TASKS)).json()["code"] == "account_suspended"


async def test_concurrent_merges_in_both_directions_lose_nothing(api: Api) -> None:
    """The second merge finds a purged account and does nothing."""
    people = [api.person(), api.person()]
    titles = {(await person.task(uuid4().hex))["title"] for person in people}
    await asyncio.gather(merge(api, *people), merge(api, *reversed(people)))
    responses = [await person.get(TASKS) for person in people]
    assert sorted(response.status_code for response in responses) == [200, 403]
    (kept,) = (response.json()["items"] for response in responses if response.is_success)
    assert {task["title"] for task in kept} == titles


async def test_a_concurrent_write_is_transferred(api: Api) -> None:
    old, new = api.person(), api.person()
    task = await old.task("before")
    id = await id_of(old)
    locked, commit = asyncio.Event(), asyncio.Event()

    async def write(transaction: Transaction) -> None:
        change = raw("UPDATE tasks SET title = 'late' WHERE owner_id = :owner AND id = :id")
        await transaction.rows(change, owner=id, id=UUID(task["id"]))
        locked.set()
        await commit.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(as_system(api, write))
        await locked.wait()
        merging = group.create_task(merge(api, old, new))
        await until_blocked(api, merging)
        commit.set()
    assert [task["title"] for task in (await new.get(TASKS)).json()["items"]] == ["late"]


def table(*items: SchemaItem) -> Table:
    keys = (Column("owner_id", Integer, primary_key=True), Column("id", Integer, primary_key=True))
    return Table("things", MetaData(), *keys, *items)


@pytest.mark.parametrize(
    "index",
    [
        Index("odd", text("lower(name)"), unique=True),
        Index("odd", "owner_id", "name", unique=True, postgresql_where=text("name <> ''")),
    ],
    ids=["expression", "partial"],
)
def test_unsupported_unique_indexes_are_refused(index: Index) -> None:
    with pytest.raises(TypeError, match="supports no unique index"):
        owned_data.Transfer(table(Column("name", Integer), index))


def test_bookkeeping_is_not_transferred() -> None:
    moved = owned_data.Transfer(
        table(
            Column("name", Integer),
            Column("n", Integer, info={"bookkeeping": True}),
            CheckConstraint("n > 0"),
            Index("by_name", "owner_id", "name", unique=True),
            ForeignKeyConstraint(["owner_id", "name"], ["things.owner_id", "things.id"]),
        )
    )
    assert [column.name for column in moved.columns] == ["id", "name"]
    assert moved.uniques == [("name",)]
