"""The tag names that are kept with each task equal the tables of tags, after any write."""

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
from tests.sync.test_changes import owner, waiting
from tests.tasks.test_tags import TAGS, TASKS, tag_id

LINK = """
INSERT INTO task_tags SELECT tasks.owner_id, tasks.id, tags.id FROM tasks JOIN tags USING (owner_id)
WHERE tasks.id = %s AND tags.name = %s
"""
DIFFERENT = (
    "SELECT id, tag_names, names_of_tags(owner_id, id) FROM tasks WHERE tag_names <> names_of_tags(owner_id, id)"
)


@pytest.fixture
def by_hand(database_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection
        assert connection.execute(DIFFERENT).fetchall() == []


async def test_what_is_written_by_hand_is_shown(api: Api, by_hand: psycopg.Connection) -> None:
    ada = api.person()
    task, other = await ada.task(tags=["b"]), await ada.task(tags=["b", "c"])
    copy = Copy(ada)
    await copy.sync()

    async def shown() -> list[list[str]]:
        await copy.sync()
        names = [(await ada.get(f"{TASKS}/{id}")).json()["tags"] for id in (task["id"], other["id"])]
        assert [copy.rows[id]["tags"] for id in (task["id"], other["id"])] == names, "a copy hears of it"
        return names

    def versions() -> list[int]:
        return [copy.rows[id]["version"] for id in (task["id"], other["id"])]

    by_hand.execute(LINK, (task["id"], "c"))
    assert await shown() == [["b", "c"], ["b", "c"]]
    assert versions() == [2, 1]
    b, c = [await tag_id(ada, name) for name in "bc"]
    by_hand.execute("UPDATE tags SET name = 'a' WHERE id = %s", (c,))
    assert await shown() == [["a", "b"], ["a", "b"]]
    assert versions() == [3, 2]
    by_hand.execute("DELETE FROM task_tags WHERE tag_id = %s", (b,))
    assert await shown() == [["a"], ["a"]]
    by_hand.execute("UPDATE tags SET name = name")
    assert await shown() == [["a"], ["a"]]
    assert versions() == [4, 3], "equal names are no change"
    by_hand.execute("UPDATE task_tags SET tag_id = %s WHERE task_id = %s", (b, task["id"]))
    assert await shown() == [["b"], ["a"]]
    by_hand.execute("UPDATE task_tags SET task_id = %s WHERE task_id = %s", (other["id"], task["id"]))
    assert await shown() == [[], ["a", "b"]]
    by_hand.execute("DELETE FROM tags WHERE id = %s", (c,))
    assert await shown() == [[], ["b"]]
    with by_hand.transaction():
        by_hand.execute("UPDATE tags SET name = 'd' WHERE id = %s", (b,))
        by_hand.execute("UPDATE tags SET name = 'e' WHERE id = %s", (b,))
    assert await shown() == [[], ["e"]]
    assert versions() == [6, 6], "one transaction, one version"


async def test_of_two_hands_at_once_both_are_shown(api: Api, by_hand: psycopg.Connection) -> None:
    ada = api.person()
    task = await ada.task(tags=["a"])
    await ada.task(tags=["b", "c"])
    async with (
        await AsyncConnection.connect(by_hand.info.dsn) as first,
        await AsyncConnection.connect(by_hand.info.dsn) as second,
    ):
        await first.execute(LINK, (task["id"], "b"))
        waiting = asyncio.create_task(second.execute(LINK, (task["id"], "c")))
        waits = "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted"
        while await (await first.execute(waits, (second.info.backend_pid,))).fetchone() != (1,):
            assert not waiting.done()
        await first.commit()
        await waiting
        await second.commit()
    assert (await ada.get(f"{TASKS}/{task['id']}")).json()["tags"] == ["a", "b", "c"]


@pytest.mark.usefixtures("by_hand")
async def test_writers_of_every_kind_leave_them_equal(api: Api) -> None:
    """The fixture looks, at the end, at whatever other tests have left, too."""
    ada = api.person()
    tasks = [await ada.task(f"{n}", tags=["a", f"own {n}"]) for n in range(6)]
    urls = [f"{TASKS}/{task['id']}" for task in tasks]
    answers = await asyncio.gather(
        ada.patch(f"{TAGS}/{await tag_id(ada, 'a')}", {"name": "z"}),
        ada.patch(urls[0], {"tags": ["a", "own 5"]}),
        ada.put(urls[1], {"title": "t"}),
        ada.put(f"{TASKS}/{uuid4()}", {"title": "t", "tags": ["own 2", "NEW"]}),
        ada.delete(f"{TAGS}/{await tag_id(ada, 'own 3')}"),
        ada.delete(urls[4]),
        ada.post(f"{TASKS}/batch", {"operations": [{"op": "create", "task": {"title": "t", "tags": ["a", "new"]}}]}),
    )
    assert [answer.is_success for answer in answers] == [True] * len(answers)
    assert (await ada.get(urls[3])).json()["tags"] == ["z"]
    assert (await ada.delete("/api/v1/users/me")).status_code == 204


async def test_who_owns_the_tables_needs_no_way_around_the_policies(postgres: str) -> None:
    """A cascade deletes as them, who see no task of anybody's."""
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
        found = await tasks.get(task["id"])
        assert (found["tags"], found["version"]) == (["c", "d"], 3)
    with psycopg.connect(url) as connection:
        assert connection.execute(DIFFERENT).fetchall() == []
        connection.execute("DELETE FROM users")
        assert connection.execute("SELECT FROM tags").fetchall() == []


async def test_a_tag_is_made_when_it_is_its_turn(api: Api) -> None:
    """Else who gives a task this tag meanwhile would neither see it nor make it."""
    ada = api.person()
    begun, over = asyncio.Event(), asyncio.Event()

    async def hold(transaction: Transaction) -> None:
        await transaction.rows(LOCK_CHANGES)
        begun.set()
        await over.wait()

    holding = asyncio.create_task(Database(api.state["pool"], Actor.user(await owner(ada))).transact(hold))
    await begun.wait()
    making = asyncio.create_task(ada.post(TAGS, {"name": "home"}))
    while not await waiting(api):
        assert not making.done()
    over.set()
    await holding
    assert (await making).status_code == 201
