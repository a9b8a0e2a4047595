"""Delta sync: a client's copy equals the table after each sync."""

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

from backend.database import SYSTEM, Actor, Database, Statement, Transaction
from backend.resources.models import LAST
from backend.resources.pagination import pack
from backend.resources.retention import purge
from backend.sync.changes import LOCK_CHANGES, Position
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
WAITING = raw(
    "SELECT count(*) AS n FROM pg_locks JOIN pg_database ON pg_database.oid = database"
    " WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"
)
AGE_TRASH = raw(
    "UPDATE tasks SET deleted_at = now() - interval '31 days' WHERE owner_id = :owner AND deleted_at IS NOT NULL"
)
DEADLOCKS = raw("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")


async def live(person: Person) -> dict[str, dict[str, Any]]:
    """All tasks of a user, by id."""
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
    """The number of writers that wait for an advisory lock."""
    row = await Database(api.state["pool"], SYSTEM).row(WAITING)
    assert row
    count: int = row["n"]
    return count


async def test_a_copy_receives_new_changed_deleted_and_restored_tasks(api: Api) -> None:
    ada = api.person()
    copy = Copy(ada, limit=2)
    assert await copy.sync() == []
    assert copy.token
    first, second, third = [await ada.task(title) for title in "abc"]
    assert await copy.sync() == [first, second, third]
    assert await copy.sync() == []
    changed = (await ada.patch(f"{TASKS}/{first['id']}", {"title": "d", "tags": ["x"]})).json()
    await ada.delete(f"{TASKS}/{third['id']}")
    changes = await copy.sync()
    assert [row["id"] for row in changes] == [first["id"], third["id"]]
    assert changes[0] == changed
    tombstone = changes[1]
    assert tombstone["deleted_at"] is not None
    times = {name: tombstone[name] for name in ("deleted_at", "updated_at")}
    assert tombstone == third | {"version": 2, **times}
    assert copy.rows == await live(ada)
    await ada.post(f"{TASKS}/{third['id']}/restore")
    assert [(row["id"], row["deleted_at"]) for row in await copy.sync()] == [(third["id"], None)]
    # A copy that starts now receives no tombstones.
    await ada.delete(f"{TASKS}/{second['id']}")
    late_copy = Copy(ada)
    assert {row["id"] for row in await late_copy.sync()} == {first["id"], third["id"]}
    assert late_copy.rows == await live(ada)


async def test_a_request_that_changes_nothing_takes_no_change_number(api: Api) -> None:
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


async def test_all_changes_of_a_transaction_have_one_change_number(api: Api) -> None:
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


async def test_a_copy_does_not_miss_a_write_that_commits_late(api: Api) -> None:
    """Later writers of the same user wait for the commit, so that the feed never shows their changes first."""
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
    assert len(copy.received) == 3


async def test_transactions_on_the_same_tasks_do_not_deadlock(api: Api) -> None:
    """Each locks the tasks in another order. The second waits for the user's lock before it locks any task."""
    ada = api.person()
    ids = [(await ada.task())["id"] for _ in range(2)]
    database, change = Database(api.state["pool"], Actor.user(await owner(ada))), raw(RENAME)
    first_holds_a_task, attempts = asyncio.Event(), []

    async def rename(transaction: Transaction, order: list[str]) -> None:
        attempts.append(order)
        for id in order:
            await transaction.rows(change, id=id, title=f"{len(attempts)}")
            if not first_holds_a_task.is_set():
                first_holds_a_task.set()
                while await waiting(api) < 1:
                    assert not second.done()

    first = asyncio.create_task(database.transact(lambda transaction: rename(transaction, ids)))
    await first_holds_a_task.wait()
    second = asyncio.create_task(database.transact(lambda transaction: rename(transaction, ids[::-1])))
    await asyncio.gather(first, second)
    assert attempts == [ids, ids[::-1]], "a transaction was retried"


async def test_writes_by_the_system_and_the_owner_are_in_commit_order(api: Api) -> None:
    """The system writes rows for the user while the user writes, too."""
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


async def test_manual_sql_is_in_the_feed_and_cannot_change_an_owner(api: Api) -> None:
    """The triggers assign change numbers also to statements that do not increase `version`."""
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


INVALID_TOKENS = {
    "empty": "",
    "not ASCII": "ä",
    "not JSON": "A" * 299,
    "not a list": pack(None),  # type: ignore[arg-type]  # `pack` encodes any JSON value
    "a member is missing": pack(["tasks", 1, LAST.hex, 0]),
    "of another feed": pack(["notes", 1, LAST.hex, 0, LAST.hex]),
    "a negative number": pack(["tasks", -1, LAST.hex, 0, LAST.hex]),
    "a boolean as the number": pack(["tasks", True, LAST.hex, 0, LAST.hex]),
    "a fraction as the number": pack(["tasks", 1.5, LAST.hex, 0, LAST.hex]),
    "a number above bigint": pack(["tasks", 2**63, LAST.hex, 0, LAST.hex]),
    "a start above bigint": pack(["tasks", 1, LAST.hex, 2**64 - 1, LAST.hex]),
    "an invalid id": pack(["tasks", 1, "x", 0, LAST.hex]),
    "a number as the owner": pack(["tasks", 1, LAST.hex, 0, 7]),
}


@pytest.mark.parametrize("token", INVALID_TOKENS.values(), ids=INVALID_TOKENS)
async def test_an_invalid_sync_token_is_refused(api: Api, token: str) -> None:
    answer = await api.person().get(CHANGES, params={"since": token})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_sync_token")
    assert [error["loc"] for error in answer.json()["errors"]] == [["query", "since"]]


async def test_a_sync_token_is_valid_for_one_account(api: Api) -> None:
    ada, eve = api.person(), api.person()
    for person in ada, eve:
        await person.task()
    copy = Copy(ada)
    await copy.sync()
    assert await Copy(eve, token=copy.token).refusal() == (410, "sync_token_expired")
    # The account is erased, and the next request creates a new one.
    id = await owner(ada)
    await Database(api.state["pool"], SYSTEM).rows(raw("DELETE FROM users WHERE id = :id"), id=id)
    api.state["users"].invalidate(ada.subject)
    await ada.task("of the new account")
    assert await owner(ada) != id
    assert await copy.refusal() == (410, "sync_token_expired")
    copy.restart()
    assert [row["title"] for row in await copy.sync()] == ["of the new account"]


async def test_a_sync_token_with_an_unassigned_change_number_has_expired(api: Api) -> None:
    """After a restored backup, a client may know change numbers that the database has not assigned yet."""
    ada = api.person()
    await ada.task()
    token = Position(10**6, LAST, 0, await owner(ada)).encode("tasks")
    assert await Copy(ada, token=token).refusal() == (410, "sync_token_expired")


@pytest.mark.parametrize("purged", [False, True], ids=["before the purge", "after the purge"])
async def test_a_sync_token_from_before_an_expired_deletion_is_refused(api: Api, purged: bool) -> None:
    """Whether the purge has run or not. Copies that received the deletion, or started after it, continue."""
    ada = api.person()
    copy, late_copy = Copy(ada), Copy(ada, limit=1)
    await ada.task("stays")
    await copy.sync()
    expired = await deleted(api, ada, "31 days", 3)
    for _ in range(2):
        await ada.task("stays, too")
    after = Copy(ada)
    await after.sync()
    await late_copy.page()
    if purged:
        await purge(api.state["pool"])
        assert await remaining(api, expired) == 0
    assert await copy.refusal() == (410, "sync_token_expired")
    assert await after.sync() == []
    await late_copy.sync()
    assert late_copy.rows == after.rows == await live(ada)


async def test_a_sync_token_that_includes_the_last_expired_deletion_is_valid(api: Api) -> None:
    """The token with the change number before the deletion has expired."""
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


async def test_a_merge_of_accounts_is_in_the_feed(api: Api) -> None:
    """The copy receives the tasks of both accounts with their tags; of two with the same id, the later one."""
    old, new = api.person(), api.person()
    id = str(uuid4())
    await new.put(f"{TASKS}/{id}", {"title": "earlier", "tags": ["home"]})
    await old.put(f"{TASKS}/{id}", {"title": "later", "tags": ["Home", "garden"]})
    await old.task("moves", tags=["garden"])
    trashed = await old.task("deleted")
    await old.delete(f"{TASKS}/{trashed['id']}")
    ids = await owner(old), await owner(new)
    copy, outdated = Copy(new), Copy(old)
    await copy.sync()
    await outdated.sync()
    await Database(api.state["pool"], SYSTEM).transact(lambda transaction: lifecycle.merge(transaction, *ids))
    assert {row["title"] for row in await copy.sync()} == {"later", "moves", "deleted"}
    assert copy.rows == await live(new)
    assert {tuple(row["tags"]) for row in copy.rows.values()} == {("garden", "home"), ("garden",)}
    assert await Copy(new, token=outdated.token).refusal() == (410, "sync_token_expired")


async def test_changes_between_the_pages_of_a_first_sync_are_included(api: Api) -> None:
    """Tasks that are created, changed and deleted after the first page was sent."""
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
    changes = await copy.sync()
    assert copy.rows == await live(ada)
    assert before[5]["id"] not in {row["id"] for row in changes}
    assert [row["id"] for row in changes] == [
        before[2]["id"],
        before[4]["id"],
        before[0]["id"],
        before[1]["id"],
        before[3]["id"],
        new["id"],
    ]


async def test_a_purge_during_a_first_sync_expires_only_tokens_that_need_it(api: Api) -> None:
    """Tombstones from before the first page do not concern the copy; one of a task that it received does."""
    ada = api.person()
    shown = [await ada.task(f"{n}") for n in range(3)]
    await deleted(api, ada, "31 days", 2)
    unaffected, outdated = Copy(ada, limit=1), Copy(ada, limit=1)
    await unaffected.page()
    await outdated.page()
    await purge(api.state["pool"])
    await unaffected.sync()
    assert unaffected.rows == await live(ada)
    assert set(outdated.rows) == {shown[0]["id"]}
    await ada.delete(f"{TASKS}/{shown[0]['id']}")
    await Database(api.state["pool"], SYSTEM).rows(AGE, age="31 days", ids=[shown[0]["id"]])
    assert await outdated.refusal() == (410, "sync_token_expired")
    await purge(api.state["pool"])
    assert await outdated.refusal() == (410, "sync_token_expired")


async def test_a_row_deleted_without_a_tombstone_expires_all_sync_tokens(api: Api) -> None:
    """Manual SQL may do that; no copy could receive the deletion."""
    ada = api.person()
    task, _ = await ada.task(), await ada.task()
    copy = Copy(ada)
    await copy.sync()
    delete = raw("DELETE FROM tasks WHERE owner_id = :owner AND id = CAST(:id AS uuid)")
    await Database(api.state["pool"], SYSTEM).rows(delete, owner=await owner(ada), id=task["id"])
    assert await copy.refusal() == (410, "sync_token_expired")
    copy.restart()
    await copy.sync()
    assert copy.rows == await live(ada)
    await ada.task()
    await copy.sync()
    assert copy.rows == await live(ada)


async def test_the_purge_skips_a_user_whose_lock_is_held(api: Api) -> None:
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


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
async def test_copies_stay_complete_under_concurrent_writers(api: Api, seed: int) -> None:
    """Eight writers use every operation on tasks and tags while three copies sync."""
    rng = random.Random(seed)  # noqa: S311  # it chooses test data
    ada = api.person()
    system = Database(api.state["pool"], SYSTEM)
    (before,) = await system.rows(DEADLOCKS)
    ids = [str(uuid4()) for _ in range(12)]
    names = [f"tag {n}" for n in range(4)]

    async def tags(method: str) -> Any:
        known = (await ada.get(TAGS)).json()["items"]
        if known:
            url = f"{TAGS}/{rng.choice(known)['id']}"
            return await ada.request(method, url, json={"name": uuid4().hex} if method == "PATCH" else None)
        return await ada.post(TAGS, {"name": uuid4().hex})

    def some_task() -> str:
        return f"{TASKS}/{rng.choice(ids)}"

    def some_tags() -> list[str]:
        return rng.sample(names, rng.randrange(3))

    def operation() -> dict[str, Any]:
        return {"op": "create", "id": rng.choice(ids), "task": {"title": uuid4().hex, "tags": some_tags()}}

    async def purge_trash() -> Any:
        await system.rows(AGE_TRASH, owner=await owner(ada))
        return await purge(api.state["pool"])

    actions: list[tuple[int, Callable[[], Coroutine[Any, Any, Any]]]] = [
        (4, lambda: ada.put(some_task(), {"title": uuid4().hex, "tags": some_tags()})),
        (4, lambda: ada.patch(some_task(), {"title": uuid4().hex})),
        (2, lambda: ada.patch(some_task(), {"tags": some_tags()})),
        (3, lambda: ada.delete(some_task())),
        (3, lambda: ada.post(f"{some_task()}/restore")),
        (2, lambda: ada.post(TASKS, {"title": uuid4().hex, "tags": some_tags()})),
        (2, lambda: ada.post(f"{TASKS}/batch", {"operations": [operation() for _ in range(3)]})),
        (1, lambda: tags("PATCH")),
        (1, lambda: tags("DELETE")),
    ]
    weights = [weight for weight, _ in actions]
    copies = [Copy(ada, limit) for limit in (1, 5, 100)]
    writers_done = asyncio.Event()

    async def write(times: int) -> None:
        for _ in range(times):
            ((_, action),) = rng.choices(actions, weights)
            answer = await action()
            assert answer.status_code < 500, answer.text

    async def follow(copy: Copy) -> None:
        while not writers_done.is_set():
            await copy.page()

    for round in range(3):
        writers_done.clear()
        followers = [asyncio.create_task(follow(copy)) for copy in copies]
        await asyncio.gather(*(write(8) for _ in range(8)))
        writers_done.set()
        await asyncio.gather(*followers)
        table = await live(ada)
        for copy in copies:
            await copy.sync()
            assert copy.rows == table, (seed, round, copy.limit)
            assert await copy.sync() == []
            assert len(set(copy.received)) == len(copy.received), "a change was sent twice"
        if round == 1:
            # The copies have all tombstones, but not the update of `deleted_at` that makes them old.
            await purge_trash()
            for copy in copies:
                if await copy.refusal() == (410, "sync_token_expired"):
                    copy.restart()
    (after,) = await system.rows(DEADLOCKS)
    assert after == before


async def test_the_statement_for_restored_backups_expires_all_sync_tokens(api: Api) -> None:
    """docs/sync.md contains it. No later change has a number that was assigned before the backup was restored."""
    text = (Path(__file__).parents[2] / "docs/sync.md").read_text()
    (statement,) = re.findall(r"^```sql\nSET ROLE api_system;\n(.*?);\n```$", text, re.MULTILINE | re.DOTALL)
    ada, eve = api.person(), api.person()
    await ada.task()
    for person in ada, eve:
        copy = Copy(person)
        await copy.sync()
        await Database(api.state["pool"], SYSTEM).rows(raw(statement))
        # More changes than were lost with the backup.
        await person.task()
        await person.task()
        assert await copy.refusal() == (410, "sync_token_expired")
        copy.restart()
        await copy.sync()
        assert copy.rows == await live(person)
        made = await person.task()
        assert await copy.sync() == [made]
