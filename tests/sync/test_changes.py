"""Delta sync: a copy that follows the feed equals the table at every quiet moment, whatever happened in between."""

import asyncio
import random
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import insert
from sqlmodel import col, select

from backend.database import SYSTEM, Actor, Database, Statement, Transaction
from backend.resources.models import LAST
from backend.resources.pagination import pack
from backend.resources.retention import purge
from backend.sync.changes import LOCK_CHANGES, ChangeCounter, Position
from backend.tasks.models import Task
from backend.tasks.statements import INSERT_TASK
from backend.users import lifecycle
from tests.conftest import Api, Person
from tests.database.test_executor import raw
from tests.support.following import TASKS, Copy
from tests.tasks.test_trash import AGE, deleted, remaining

TAGS = "/api/v1/tags"
CHANGES = f"{TASKS}/changes"
NEW = {"title": "t", "description": None, "status": "todo", "priority": "normal", "due_at": None}
NUMBER = raw("SELECT n, purged FROM change_counters WHERE owner_id = :owner")
RENAME = "UPDATE tasks SET title = :title, version = version + 1 WHERE owner_id = :caller AND id = CAST(:id AS uuid)"
WAITING = raw("SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
DEADLOCKS = raw("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")


async def live(person: Person) -> dict[str, dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await person.get(TASKS, params={"limit": 100, **cursor})).json()
        rows += page["items"]
        if page["next_cursor"] is None:
            return {row["id"]: row for row in rows}
        cursor = {"cursor": page["next_cursor"]}


async def owner(person: Person) -> UUID:
    return UUID((await person.get("/api/v1/users/me")).json()["id"])


async def waiting(api: Api) -> int:
    """How many writers wait for their turn."""
    row = await Database(api.state["pool"], SYSTEM).row(WAITING)
    assert row
    count: int = row["n"]
    return count


async def test_from_nothing_to_tombstones(api: Api) -> None:
    ada = api.person()
    copy = Copy(ada, limit=2)
    assert await copy.sync() == []
    assert copy.token
    first, second, third = [await ada.task(title) for title in "abc"]
    assert await copy.sync() == [first, second, third]
    assert await copy.sync() == []
    changed = (await ada.patch(f"{TASKS}/{first['id']}", {"title": "d", "tags": ["x"]})).json()
    await ada.delete(f"{TASKS}/{third['id']}")
    told = await copy.sync()
    assert [row["id"] for row in told] == [first["id"], third["id"]]
    assert told[0] == changed
    assert told[1] == third | {"version": 2, "deleted_at": told[1]["deleted_at"], "updated_at": told[1]["updated_at"]}
    assert told[1]["deleted_at"] is not None
    assert copy.rows == await live(ada)
    await ada.post(f"{TASKS}/{third['id']}/restore")
    assert [(row["id"], row["deleted_at"]) for row in await copy.sync()] == [(third["id"], None)]
    # Who begins now is told of nothing that is gone.
    await ada.delete(f"{TASKS}/{second['id']}")
    beginner = Copy(ada)
    assert {row["id"] for row in await beginner.sync()} == {first["id"], third["id"]}
    assert beginner.rows == await live(ada)


async def test_what_changes_nothing_is_not_told(api: Api) -> None:
    ada = api.person()
    task = await ada.task(tags=["a"])
    id = await owner(ada)
    copy = Copy(ada)
    await copy.sync()
    database = Database(api.state["pool"], SYSTEM)
    before = await database.row(NUMBER, owner=id)
    url = f"{TASKS}/{task['id']}"
    await ada.patch(url, {"title": task["title"], "tags": ["A"]})
    await ada.patch(url, {})
    await ada.patch(url, {"title": "x"}, headers={"If-Match": '"9"'})
    await ada.patch(f"{TASKS}/{uuid4()}", {"title": "x"})
    await ada.post(f"{url}/restore")
    assert await database.row(NUMBER, owner=id) == before
    await ada.put(url, {name: task[name] for name in ("title", "tags")})
    await ada.put(f"{TASKS}/{task['id']}", {"title": "x"}, headers={"If-None-Match": "*"})
    assert await copy.sync() == []


async def test_a_transaction_takes_one_number(api: Api) -> None:
    ada = api.person()
    operations = [{"op": "create", "task": {"title": f"{n}", "tags": ["home"]}} for n in range(50)]
    assert (await ada.post(f"{TASKS}/batch", {"operations": operations})).status_code == 200
    id = await owner(ada)
    database = Database(api.state["pool"], SYSTEM)
    row = await database.row(NUMBER, owner=id)
    assert row
    assert row["n"] == 1
    copy = Copy(ada, limit=7)
    assert len(await copy.sync()) == 50
    assert copy.rows == await live(ada)
    (tag,) = (await ada.get(TAGS)).json()["items"]
    await ada.patch(f"{TAGS}/{tag['id']}", {"name": "away"})
    assert len(await copy.sync()) == 50
    assert copy.rows == await live(ada)
    await ada.delete(f"{TAGS}/{tag['id']}")
    assert len(await copy.sync()) == 50
    row = await database.row(NUMBER, owner=id)
    assert row
    assert row["n"] == 3


async def test_what_commits_late_is_not_missed(api: Api) -> None:
    """The one that began first commits last, as far as it can: nobody is shown what comes after it before."""
    ada = api.person()
    id = await owner(ada)
    copy = Copy(ada)
    await copy.sync()
    database = Database(api.state["pool"], Actor.user(id))
    written, commit = asyncio.Event(), asyncio.Event()

    async def slow(transaction: Transaction) -> None:
        await transaction.rows(INSERT_TASK, **NEW | {"title": "late"})
        written.set()
        await commit.wait()

    late = asyncio.create_task(database.transact(slow))
    await written.wait()
    soon = [asyncio.create_task(ada.task(f"{n}")) for n in range(2)]
    while await waiting(api) < 2:
        assert await copy.sync() == []
        assert not [task for task in soon if task.done()]
    commit.set()
    await late
    await asyncio.gather(*soon)
    assert (await copy.sync())[0]["title"] == "late"
    assert copy.rows == await live(ada)
    assert len(copy.told) == 3


async def test_nobody_waits_in_a_circle(api: Api) -> None:
    """Two who change the same tasks in another order: the second waits before it has anything in hand."""
    ada = api.person()
    ids = [(await ada.task())["id"] for _ in range(2)]
    database, change = Database(api.state["pool"], Actor.user(await owner(ada))), raw(RENAME)
    begun, begins = asyncio.Event(), []

    async def rename(transaction: Transaction, order: list[str]) -> None:
        begins.append(order)
        for id in order:
            await transaction.rows(change, id=id, title=f"{len(begins)}")
            if not begun.is_set():
                begun.set()
                while await waiting(api) < 1:
                    assert not second.done()

    first = asyncio.create_task(database.transact(lambda transaction: rename(transaction, ids)))
    await begun.wait()
    second = asyncio.create_task(database.transact(lambda transaction: rename(transaction, ids[::-1])))
    await asyncio.gather(first, second)
    assert begins == [ids, ids[::-1]], "nobody had to begin again"


async def test_the_system_takes_turns_with_the_owner(api: Api) -> None:
    """Rows that are written in a person's name by somebody else are in their feed, in the order of commits."""
    ada = api.person()
    id = await owner(ada)
    copy = Copy(ada)
    await copy.sync()
    statement = Statement(insert(Task).values(owner_id=id, title="given", status="todo", priority="low"))
    written, commit = asyncio.Event(), asyncio.Event()

    async def slow(transaction: Transaction) -> None:
        await transaction.rows(statement)
        written.set()
        await commit.wait()

    late = asyncio.create_task(Database(api.state["pool"], SYSTEM).transact(slow))
    await written.wait()
    soon = asyncio.create_task(ada.task("own"))
    assert await copy.sync() == []
    commit.set()
    await asyncio.gather(late, soon)
    assert [row["title"] for row in await copy.sync()] == ["given", "own"]


async def test_nobody_passes_by_the_feed(api: Api) -> None:
    """Statements said by hand take part, though they count no version; a row keeps its owner."""
    ada = api.person()
    task = await ada.task("by the API")
    await ada.task("another")
    copy = Copy(ada)
    await copy.sync()
    database = Database(api.state["pool"], SYSTEM)
    by_hand = raw("UPDATE tasks SET title = 'by hand', n = 7 WHERE owner_id = :owner AND id = CAST(:id AS uuid)")
    await database.rows(by_hand, owner=await owner(ada), id=task["id"])
    assert [row["title"] for row in await copy.sync()] == ["by hand"]
    eve = api.person()
    give = raw("UPDATE tasks SET owner_id = :to WHERE owner_id = :owner")
    with pytest.raises(psycopg.errors.RaiseException, match="keeps its owner"):
        await database.rows(give, owner=await owner(ada), to=await owner(eve))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "\0",
        "ä",
        "A" * 299,
        "bnVsbA",
        pack([]),
        pack(["tasks"]),
        pack(["tasks", 1, LAST.hex, 0]),
        pack(["notes", 1, LAST.hex, 0, LAST.hex]),
        pack(["tasks", -1, LAST.hex, 0, LAST.hex]),
        pack(["tasks", True, LAST.hex, 0, LAST.hex]),
        pack(["tasks", 1.5, LAST.hex, 0, LAST.hex]),
        pack(["tasks", 2**63, LAST.hex, 0, LAST.hex]),
        pack(["tasks", 1, LAST.hex, 2**64 - 1, LAST.hex]),
        pack(["tasks", 1, "x", 0, LAST.hex]),
        pack(["tasks", 1, LAST.hex, 0, 7]),
        pack(["tasks", 1, LAST.hex, 0, {}]),
    ],
)
async def test_what_is_no_token(api: Api, token: str) -> None:
    answer = await api.person().get(CHANGES, params={"since": token})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_sync_token")
    assert [error["loc"] for error in answer.json()["errors"]] == [["query", "since"]]


async def test_a_token_is_good_for_one_account_alone(api: Api) -> None:
    ada, eve = api.person(), api.person()
    for person in ada, eve:
        await person.task()
    copy = Copy(ada)
    await copy.sync()
    assert await Copy(eve, token=copy.token).refused() == (410, "sync_token_expired")
    # The account is erased, and made again by the next request.
    id = await owner(ada)
    await Database(api.state["pool"], SYSTEM).rows(raw("DELETE FROM users WHERE id = :id"), id=id)
    api.state["users"].invalidate(ada.subject)
    await ada.task("of the new account")
    assert await owner(ada) != id
    assert await copy.refused() == (410, "sync_token_expired")
    copy.begin()
    assert [row["title"] for row in await copy.sync()] == ["of the new account"]


async def test_a_number_that_nobody_has_taken(api: Api) -> None:
    """As after the database was brought back to an earlier day: the copy knows of what is not there any more."""
    ada = api.person()
    await ada.task()
    token = Position(10**6, LAST, 0, await owner(ada)).encode("tasks")
    assert await Copy(ada, token=token).refused() == (410, "sync_token_expired")


@pytest.mark.parametrize("purged", [False, True])
async def test_what_is_purged_cannot_be_told(api: Api, purged: bool) -> None:
    """Whether the purge has run or not: who has not heard of the deletion starts anew, who has goes on."""
    ada = api.person()
    copy, beginner = Copy(ada), Copy(ada, limit=1)
    await ada.task("stays")
    await copy.sync()
    gone = await deleted(api, ada, "31 days", 3)
    for _ in range(2):
        await ada.task("stays, too")
    after = Copy(ada)
    await after.sync()
    await beginner.page()
    if purged:
        await purge(api.state["pool"])
        assert await remaining(api, gone) == 0
    assert await copy.refused() == (410, "sync_token_expired")
    assert await after.sync() == []
    await beginner.sync()
    assert beginner.rows == after.rows == await live(ada)


async def test_who_has_heard_of_the_last_that_is_purged_goes_on(api: Api) -> None:
    """Exactly: the number of the deletion is enough, the one before is not."""
    ada = api.person()
    task = await ada.task()
    copy = Copy(ada)
    await copy.sync()
    await ada.delete(f"{TASKS}/{task['id']}")
    await Database(api.state["pool"], SYSTEM).rows(AGE, age="29 days 23:59", ids=[task["id"]])
    assert [row["id"] for row in await copy.sync()] == [task["id"]]
    await Database(api.state["pool"], SYSTEM).rows(AGE, age="30 days", ids=[task["id"]])
    number = await Database(api.state["pool"], SYSTEM).row(NUMBER, owner=await owner(ada))
    assert number
    for n, status in (number["n"] - 1, 410), (number["n"], 200):
        token = Position(n, LAST, 0, await owner(ada)).encode("tasks")
        for purged in False, True:
            if purged:
                await purge(api.state["pool"])
            assert (await ada.get(CHANGES, params={"since": token})).status_code == status, (n, purged)


async def test_a_merge_is_told_as_it_ends(api: Api) -> None:
    """Tasks of both come with their tags, and of two with one id the later one."""
    old, new = api.person(), api.person()
    id = str(uuid4())
    await new.put(f"{TASKS}/{id}", {"title": "earlier", "tags": ["home"]})
    await old.put(f"{TASKS}/{id}", {"title": "later", "tags": ["Home", "garden"]})
    await old.task("moves", tags=["garden"])
    gone = await old.task("is gone")
    await old.delete(f"{TASKS}/{gone['id']}")
    ids = await owner(old), await owner(new)
    copy, lost = Copy(new), Copy(old)
    await copy.sync()
    await lost.sync()
    await Database(api.state["pool"], SYSTEM).transact(lambda transaction: lifecycle.merge(transaction, *ids))
    assert {row["title"] for row in await copy.sync()} == {"later", "moves", "is gone"}
    assert copy.rows == await live(new)
    assert {tuple(row["tags"]) for row in copy.rows.values()} == {("garden", "home"), ("garden",)}
    assert await Copy(new, token=lost.token).refused() == (410, "sync_token_expired")


async def test_a_copy_that_takes_long_to_begin(api: Api) -> None:
    """Between two of its first pages rows change, go and come: in the end it is as if it had begun then."""
    ada = api.person()
    before = [await ada.task(f"{n}") for n in range(6)]
    await ada.delete(f"{TASKS}/{before[5]['id']}")
    copy = Copy(ada, limit=2)
    await copy.page()
    assert set(copy.rows) == {task["id"] for task in before[:2]}
    await ada.delete(f"{TASKS}/{before[0]['id']}")
    await ada.patch(f"{TASKS}/{before[1]['id']}", {"title": "changed"})
    await ada.delete(f"{TASKS}/{before[3]['id']}")
    new = await ada.task("new")
    told = await copy.sync()
    assert copy.rows == await live(ada)
    assert before[5]["id"] not in {row["id"] for row in told}
    assert [row["id"] for row in told] == [
        before[2]["id"],
        before[4]["id"],
        before[0]["id"],
        before[1]["id"],
        before[3]["id"],
        new["id"],
    ]


async def test_a_purge_while_a_copy_begins(api: Api) -> None:
    """Of what was deleted before it began it need not hear. Of what it was shown, and is purged since, it would not."""
    ada = api.person()
    shown = [await ada.task(f"{n}") for n in range(3)]
    await deleted(api, ada, "31 days", 2)
    fine, lost = Copy(ada, limit=1), Copy(ada, limit=1)
    await fine.page()
    await lost.page()
    await purge(api.state["pool"])
    await fine.sync()
    assert fine.rows == await live(ada)
    assert set(lost.rows) == {shown[0]["id"]}
    await ada.delete(f"{TASKS}/{shown[0]['id']}")
    await Database(api.state["pool"], SYSTEM).rows(AGE, age="31 days", ids=[shown[0]["id"]])
    assert await lost.refused() == (410, "sync_token_expired")
    await purge(api.state["pool"])
    assert await lost.refused() == (410, "sync_token_expired")


async def test_a_row_that_is_deleted_for_good_at_once(api: Api) -> None:
    """By hand, without a tombstone: every copy starts anew, since none can be told."""
    ada = api.person()
    task, _ = await ada.task(), await ada.task()
    copy = Copy(ada)
    await copy.sync()
    gone = raw("DELETE FROM tasks WHERE owner_id = :owner AND id = CAST(:id AS uuid)")
    await Database(api.state["pool"], SYSTEM).rows(gone, owner=await owner(ada), id=task["id"])
    assert await copy.refused() == (410, "sync_token_expired")
    copy.begin()
    await copy.sync()
    assert copy.rows == await live(ada)
    await ada.task()
    await copy.sync()
    assert copy.rows == await live(ada)


async def test_the_purge_waits_for_nobody(api: Api) -> None:
    busy, idle = api.person(), api.person()
    theirs, others = [await deleted(api, person, "31 days", 2) for person in (busy, idle)]
    held, release = asyncio.Event(), asyncio.Event()

    async def write(transaction: Transaction) -> None:
        await transaction.rows(LOCK_CHANGES)
        held.set()
        await release.wait()

    writing = asyncio.create_task(Database(api.state["pool"], Actor.user(await owner(busy))).transact(write))
    await held.wait()
    await purge(api.state["pool"])
    assert (await remaining(api, theirs), await remaining(api, others)) == (2, 0)
    release.set()
    await writing
    await purge(api.state["pool"])
    assert await remaining(api, theirs) == 0


async def test_counters_show_their_owner_alone(api: Api) -> None:
    ada, eve = api.person(), api.person()
    for person in ada, eve:
        await person.task()
    careless = Statement(select(col(ChangeCounter.owner_id)))
    rows = await Database(api.state["pool"], Actor.user(await owner(ada))).rows(careless)
    assert [row["owner_id"] for row in rows] == [await owner(ada)]


@pytest.mark.parametrize("seed", range(3))
async def test_copies_under_many_writers(api: Api, seed: int) -> None:
    """Everything that can be done to a task, by many at once, and copies that follow meanwhile."""
    dice = random.Random(seed)  # noqa: S311  # nothing to guess
    ada = api.person()
    system = Database(api.state["pool"], SYSTEM)
    (before,) = await system.rows(DEADLOCKS)
    ids = [str(uuid4()) for _ in range(12)]
    names = [f"tag {n}" for n in range(4)]

    async def tags(method: str) -> Any:
        known = (await ada.get(TAGS)).json()["items"]
        if known:
            url = f"{TAGS}/{dice.choice(known)['id']}"
            return await ada.request(method, url, json={"name": uuid4().hex} if method == "PATCH" else None)
        return await ada.post(TAGS, {"name": uuid4().hex})

    def some() -> str:
        return f"{TASKS}/{dice.choice(ids)}"

    def chosen() -> list[str]:
        return dice.sample(names, dice.randrange(3))

    def operation() -> dict[str, Any]:
        return {"op": "create", "id": dice.choice(ids), "task": {"title": uuid4().hex, "tags": chosen()}}

    async def age() -> Any:
        await system.rows(AGE_BIN, owner=await owner(ada))
        return await purge(api.state["pool"])

    deeds: list[tuple[int, Callable[[], Coroutine[Any, Any, Any]]]] = [
        (4, lambda: ada.put(some(), {"title": uuid4().hex, "tags": chosen()})),
        (4, lambda: ada.patch(some(), {"title": uuid4().hex})),
        (2, lambda: ada.patch(some(), {"tags": chosen()})),
        (3, lambda: ada.delete(some())),
        (3, lambda: ada.post(f"{some()}/restore")),
        (2, lambda: ada.post(TASKS, {"title": uuid4().hex, "tags": chosen()})),
        (2, lambda: ada.post(f"{TASKS}/batch", {"operations": [operation() for _ in range(3)]})),
        (1, lambda: tags("PATCH")),
        (1, lambda: tags("DELETE")),
    ]
    weights = [weight for weight, _ in deeds]
    copies = [Copy(ada, limit) for limit in (1, 5, 100)]
    over = asyncio.Event()

    async def write(times: int) -> None:
        for _ in range(times):
            ((_, deed),) = dice.choices(deeds, weights)
            answer = await deed()
            assert answer.status_code < 500, answer.text

    async def follow(copy: Copy) -> None:
        while not over.is_set():
            await copy.page()

    for round in range(3):
        over.clear()
        followers = [asyncio.create_task(follow(copy)) for copy in copies]
        await asyncio.gather(*(write(8) for _ in range(8)))
        over.set()
        await asyncio.gather(*followers)
        table = await live(ada)
        for copy in copies:
            await copy.sync()
            assert copy.rows == table, (seed, round, copy.limit)
            assert await copy.sync() == []
            assert len(set(copy.told)) == len(copy.told), "something was told twice"
        if round == 1:
            # What is in the bin is purged; everybody has heard of it, but by the hand that makes it old.
            await age()
            for copy in copies:
                if await copy.refused() == (410, "sync_token_expired"):
                    copy.begin()
    (after,) = await system.rows(DEADLOCKS)
    assert after == before


AGE_BIN = raw(
    "UPDATE tasks SET deleted_at = now() - interval '31 days' WHERE owner_id = :owner AND deleted_at IS NOT NULL"
)


async def test_after_a_backup_every_copy_begins_anew(api: Api) -> None:
    """By what the documentation tells whoever has restored one: no number is taken for one of before."""
    text = (Path(__file__).parents[2] / "docs/sync.md").read_text()
    (statement,) = re.findall(r"^```sql\nSET ROLE api_system;\n(.*?);\n```$", text, re.MULTILINE | re.DOTALL)
    ada, eve = api.person(), api.person()
    await ada.task()
    for person in ada, eve:
        copy = Copy(person)
        await copy.sync()
        await Database(api.state["pool"], SYSTEM).rows(raw(statement))
        # As many as are lost, and more.
        await person.task()
        await person.task()
        assert await copy.refused() == (410, "sync_token_expired")
        copy.begin()
        await copy.sync()
        assert copy.rows == await live(person)
        made = await person.task()
        assert await copy.sync() == [made]
