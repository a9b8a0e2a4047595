"""The tag names stored with each task equal the tables of tags after any write, including direct SQL."""

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import AsyncConnection

from backend import migrations
from backend.database import Actor, Database, Pool, Transaction
from backend.sync.changes import LOCK_CHANGES
from backend.tasks.schemas import TagUpdate, TaskCreate
from backend.tasks.service import TaskService
from backend.tasks.tags import TagService
from tests.conftest import Api, create_database
from tests.database.test_migrations import ordinary_login
from tests.support.following import Copy
from tests.tasks.test_tags import TAGS, TASKS, tag_id
from tests.users.test_lifecycle import id_of, until_blocked

LINK = """
INSERT INTO task_tags SELECT tasks.owner_id, tasks.id, tags.id FROM tasks JOIN tags USING (owner_id)
WHERE tasks.id = %s AND tags.name = %s
"""
INCONSISTENT = (
    "SELECT id, tag_names, names_of_tags(owner_id, id) FROM tasks WHERE tag_names <> names_of_tags(owner_id, id)"
)


@pytest.fixture
def direct(database_url: str) -> Iterator[psycopg.Connection]:
    """A direct connection to the database. In the end, checks the tag names of all tasks in the database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection
        assert connection.execute(INCONSISTENT).fetchall() == []


async def test_direct_writes_update_tag_names_and_versions(api: Api, direct: psycopg.Connection) -> None:
    ada = api.person()
    task, other = await ada.task(tags=["b"]), await ada.task(tags=["b", "c"])
    copy = Copy(ada)
    await copy.sync()

    async def names() -> list[list[str]]:
        """The tags of both tasks, by GET and by delta sync."""
        await copy.sync()
        tags = [(await ada.get(f"{TASKS}/{id}")).json()["tags"] for id in (task["id"], other["id"])]
        assert [copy.rows[id]["tags"] for id in (task["id"], other["id"])] == tags
        return tags

    def versions() -> list[int]:
        return [copy.rows[id]["version"] for id in (task["id"], other["id"])]

    direct.execute(LINK, (task["id"], "c"))
    assert await names() == [["b", "c"], ["b", "c"]]
    assert versions() == [2, 1]
    b, c = [await tag_id(ada, name) for name in "bc"]
    direct.execute("UPDATE tags SET name = 'a' WHERE id = %s", (c,))
    assert await names() == [["a", "b"], ["a", "b"]]
    assert versions() == [3, 2]
    direct.execute("DELETE FROM task_tags WHERE tag_id = %s", (b,))
    assert await names() == [["a"], ["a"]]
    direct.execute("UPDATE tags SET name = name")
    assert await names() == [["a"], ["a"]]
    assert versions() == [4, 3]
    direct.execute("UPDATE task_tags SET tag_id = %s WHERE task_id = %s", (b, task["id"]))
    assert await names() == [["b"], ["a"]]
    direct.execute("UPDATE task_tags SET task_id = %s WHERE task_id = %s", (other["id"], task["id"]))
    assert await names() == [[], ["a", "b"]]
    direct.execute("DELETE FROM tags WHERE id = %s", (c,))
    assert await names() == [[], ["b"]]
    with direct.transaction():
        direct.execute("UPDATE tags SET name = 'd' WHERE id = %s", (b,))
        direct.execute("UPDATE tags SET name = 'e' WHERE id = %s", (b,))
    assert await names() == [[], ["e"]]
    assert versions() == [6, 6]  # one new version per transaction


async def test_concurrent_direct_writes_are_both_applied(api: Api, direct: psycopg.Connection) -> None:
    ada = api.person()
    task = await ada.task(tags=["a"])
    await ada.task(tags=["b", "c"])
    async with (
        await AsyncConnection.connect(direct.info.dsn) as first,
        await AsyncConnection.connect(direct.info.dsn) as second,
    ):
        await first.execute(LINK, (task["id"], "b"))
        blocked = asyncio.create_task(second.execute(LINK, (task["id"], "c")))
        await until_blocked(api, blocked)
        await first.commit()
        await blocked
        await second.commit()
    assert (await ada.get(f"{TASKS}/{task['id']}")).json()["tags"] == ["a", "b", "c"]


@pytest.mark.usefixtures("direct")
async def test_concurrent_requests_keep_tag_names_consistent(api: Api) -> None:
    ada = api.person()
    tasks = [await ada.task(f"{n}", tags=["a", f"own {n}"]) for n in range(6)]
    urls = [f"{TASKS}/{task['id']}" for task in tasks]
    responses = await asyncio.gather(
        ada.patch(f"{TAGS}/{await tag_id(ada, 'a')}", {"name": "z"}),
        ada.patch(urls[0], {"tags": ["a", "own 5"]}),
        ada.put(urls[1], {"title": "t"}),
        ada.put(f"{TASKS}/{uuid4()}", {"title": "t", "tags": ["own 2", "NEW"]}),
        ada.delete(f"{TAGS}/{await tag_id(ada, 'own 3')}"),
        ada.delete(urls[4]),
        ada.post(f"{TASKS}/batch", {"operations": [{"op": "create", "task": {"title": "t", "tags": ["a", "new"]}}]}),
    )
    assert all(response.is_success for response in responses)
    assert (await ada.get(urls[3])).json()["tags"] == ["z"]
    assert (await ada.delete("/api/v1/users/me")).status_code == 204


async def test_a_table_owner_without_bypassrls_keeps_tag_names_consistent(postgres: str) -> None:
    """Cascading deletes run as the table owner, which sees no rows under forced row-level security."""
    url = create_database(postgres, f"owned_{uuid4().hex[:8]}")
    login = ordinary_login(url)
    migrations.upgrade(login)
    with psycopg.connect(url, autocommit=True) as connection:
        insert = "INSERT INTO users (issuer, subject) VALUES ('i', '1') RETURNING id"
        (id,) = connection.execute(insert).fetchone() or ()
    async with Pool(login, size=5) as pool:
        database = Database(pool, Actor.user(id))
        tasks, tags = TaskService(database), TagService(database)
        task = await tasks.create(TaskCreate(title="t", tags=["a", "b", "c"]))
        a, b, _ = [tag["id"] for tag in await tags.list()]
        await tags.delete(a)
        await tags.update(b, TagUpdate(name="d"))
        updated = await tasks.get(task["id"])
        assert (updated["tags"], updated["version"]) == (["c", "d"], 3)
    with psycopg.connect(url) as connection:
        assert connection.execute(INCONSISTENT).fetchall() == []
        connection.execute("DELETE FROM users")
        assert connection.execute("SELECT FROM tags").fetchall() == []


async def test_creating_a_tag_waits_for_the_lock_of_its_owner(api: Api) -> None:
    """Otherwise a concurrent write of a task with this tag would neither find nor create it."""
    ada = api.person()
    locked, release = asyncio.Event(), asyncio.Event()

    async def hold(transaction: Transaction) -> None:
        await transaction.rows(LOCK_CHANGES)
        locked.set()
        await release.wait()

    holding = asyncio.create_task(Database(api.state["pool"], Actor.user(await id_of(ada))).transact(hold))
    await locked.wait()
    creating = asyncio.create_task(ada.post(TAGS, {"name": "home"}))
    await until_blocked(api, creating)
    release.set()
    await holding
    assert (await creating).status_code == 201
