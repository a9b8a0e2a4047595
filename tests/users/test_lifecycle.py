"""The lifecycle of accounts: bans, suspensions, roles, erasure, and the notifications of these changes."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from backend.database import SYSTEM, Database, Row, Transaction
from backend.users import lifecycle, owned_data
from tests.conftest import ISSUER, Api, Person
from tests.database.test_executor import raw
from tests.resources.test_owned_resources import RESOURCES

ME = "/api/v1/users/me"
TASKS = "/api/v1/tasks"
NOW = datetime.now(UTC).replace(microsecond=0)
EARLIER, LATER = NOW - timedelta(minutes=5), NOW + timedelta(minutes=5)


async def as_system(api: Api, work: Callable[..., Awaitable[Any]], *values: object) -> Any:
    return await Database(api.state["pool"], SYSTEM).transact(lambda transaction: work(transaction, *values))


async def row_of(api: Api, subject: str) -> Row:
    rows = await Database(api.state["pool"], SYSTEM).rows(
        raw("SELECT * FROM users WHERE subject = :subject"), subject=subject
    )
    assert len(rows) == 1
    return rows[0]


async def id_of(person: Person) -> UUID:
    return UUID((await person.get(ME)).json()["id"])


def api_key_tokens(person: Person, scope: str, **claims: Any) -> list[str]:
    """Tokens of API keys of a user, one of them with a key id of an unusual form."""
    token = person.api.issuer.api_key_token
    keys: tuple[object, ...] = ("key1", "", None, 5, False, [], {})
    return [token(person.subject, scope=scope, api_key=key, **claims) for key in keys]


async def count_rows(api: Api, id: UUID) -> dict[str, int]:
    """The number of rows that the user owns in each table."""
    numbers = {}
    for table in owned_data.tables():
        count = raw(f"SELECT count(*) AS n FROM {table.name} WHERE owner_id = :id")  # noqa: S608  # of the metadata
        row = await Database(api.state["pool"], SYSTEM).row(count, id=id)
        assert row
        numbers[table.name] = row["n"]
    return numbers


async def until_blocked(api: Api, work: asyncio.Task[Any]) -> None:
    """Wait until a transaction in this database waits for a lock. Fails if `work` ends first."""
    waiting = raw(
        "SELECT count(*) AS n FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE NOT granted AND datname = current_database()"
    )
    database = Database(api.state["pool"], SYSTEM)
    while not (row := await database.row(waiting)) or not row["n"]:
        assert not work.done()


async def test_an_event_can_create_the_row_before_the_first_request(api: Api) -> None:
    ada = api.person(name="Ada")
    rows = await asyncio.gather(*(as_system(api, lifecycle.ensure, ISSUER, ada.subject) for _ in range(20)))
    assert len({row["id"] for row in rows}) == 1
    assert (rows[0]["status"], rows[0]["name"]) == ("active", None)
    assert (await ada.get(ME)).json()["id"] == str(rows[0]["id"])
    assert (await ada.get(ME)).json()["name"] == "Ada"
    again = await as_system(api, lifecycle.ensure, ISSUER, ada.subject)
    assert (again["id"], again["name"]) == (rows[0]["id"], "Ada")


async def test_older_bans_and_unbans_never_overwrite(api: Api) -> None:
    ada = api.person()
    id = await id_of(ada)
    steps = [(True, NOW, True), (False, EARLIER, False), (True, NOW, True), (False, LATER, True), (True, NOW, False)]
    for banned, at, applied in steps:
        assert await as_system(api, lifecycle.set_banned, id, banned, at) is applied
    row = await row_of(api, ada.subject)
    assert (row["status"], row["banned"], row["banned_at"]) == ("active", False, LATER)


@pytest.mark.parametrize("first", ["administrator", "issuer"])
async def test_suspension_and_ban_are_independent(api: Api, first: str) -> None:
    """In any order and at any time, only a user who is neither suspended nor banned is active."""
    ada = api.person()
    id = await id_of(ada)

    async def refuse(authority: str, refused: bool) -> str:
        if authority == "administrator":
            await as_system(api, lifecycle.set_suspended, id, refused)
        else:
            assert await as_system(api, lifecycle.set_banned, id, refused, EARLIER if refused else LATER)
        status: str = (await row_of(api, ada.subject))["status"]
        return status

    second = "issuer" if first == "administrator" else "administrator"
    assert await refuse(first, True) == await refuse(second, True) == "suspended"
    since = (await row_of(api, ada.subject))["status_at"]
    assert await refuse(first, False) == "suspended"
    assert (await row_of(api, ada.subject))["status_at"] == since
    assert await refuse(second, False) == "active"
    assert (await row_of(api, ada.subject))["status_at"] > since


@pytest.mark.parametrize(
    ("suspended", "banned", "change", "expected"),
    [
        (False, False, "status = 'suspended'", ("suspended", True, False)),
        (False, True, "status = 'active'", ("active", False, False)),
        (True, True, "status = 'active'", ("active", False, False)),
        (False, True, "status = 'active', suspended_here = true", ("suspended", True, True)),
        (False, False, "banned = true", ("suspended", False, True)),
        (True, True, "suspended_here = false", ("suspended", False, True)),
        (True, False, "status = 'purged'", ("purged", True, False)),
    ],
)
async def test_the_status_follows_direct_updates(
    api: Api, suspended: bool, banned: bool, change: str, expected: tuple[str, bool, bool]
) -> None:
    """Older versions and administrators of the database set `status` only."""
    ada = api.person()
    await ada.get(ME)
    system = Database(api.state["pool"], SYSTEM)
    both = raw("UPDATE users SET suspended_here = :suspended, banned = :banned WHERE subject = :subject")
    await system.rows(both, suspended=suspended, banned=banned, subject=ada.subject)
    await system.rows(raw(f"UPDATE users SET {change} WHERE subject = :subject"), subject=ada.subject)  # noqa: S608  # of this test
    row = await row_of(api, ada.subject)
    assert (row["status"], row["suspended_here"], row["banned"]) == expected


async def test_older_roles_never_overwrite(api: Api) -> None:
    ada = api.person(role="admin", iat=NOW.timestamp())
    id = await id_of(ada)
    steps = [(["user"], EARLIER, False), (["user"], NOW, True), (["editor"], LATER, True), (["admin"], NOW, False)]
    for roles, at, applied in steps:
        assert await as_system(api, lifecycle.set_roles, id, roles, at) is applied
    api.state["users"].invalidate(ada.subject)
    assert (await ada.get(ME)).json()["roles"] == ["editor"]


async def test_the_revocation_time_only_rises(api: Api) -> None:
    ada = api.person()
    id = await id_of(ada)
    for at in NOW, EARLIER:
        await as_system(api, lifecycle.revoke_tokens, id, at)
        assert (await row_of(api, ada.subject))["tokens_valid_after"] == NOW


async def create_data(person: Person) -> None:
    """Create rows in every table of the user's data."""
    task = await person.task("mine", tags=["home", "garden"])
    await person.delete(f"{TASKS}/{task['id']}")
    await person.post(TASKS, {"title": "x", "tags": ["home"]}, headers={"Idempotency-Key": "1"})
    for resource in RESOURCES:
        await person.post(resource.path, resource.new)


@pytest.mark.parametrize("end", ["erase", "purge"])
async def test_nothing_of_an_account_is_left(api: Api, end: str) -> None:
    ada, eve = api.person(name="Ada", email="ada@example.com"), api.person()
    for person in ada, eve:
        await create_data(person)
    await ada.patch(ME, {"locale": "de", "time_zone": "Europe/Berlin"})
    id, other = await id_of(ada), await id_of(eve)
    theirs = await count_rows(api, other)
    assert all(theirs.values())  # each table has rows
    assert await count_rows(api, id) == theirs
    if end == "erase":
        await as_system(api, lifecycle.erase, id)
    else:
        await as_system(api, lifecycle.purge, id, NOW)
        row = await row_of(api, ada.subject)
        assert row["id"] != id
        for name in "email", "name", "image", "locale", "time_zone":
            assert row[name] is None
    assert not any((await count_rows(api, id)).values())
    assert await count_rows(api, other) == theirs
    api.state["users"].invalidate(ada.subject)
    response = await ada.get(ME)
    if end == "purge":
        assert (response.status_code, response.json()["code"]) == (403, "account_purged")
        assert (await row_of(api, ada.subject))["name"] is None
    else:
        assert response.json()["id"] != str(id)
        assert (response.json()["name"], response.json()["locale"]) == ("Ada", None)
        assert (await ada.get(TASKS)).json()["items"] == []


@pytest.mark.parametrize("end", ["erase", "purge"])
async def test_a_stale_cached_id_cannot_write(api: Api, end: str) -> None:
    """Another worker may have the caller in its cache for a moment. Its requests then write no row."""
    ada = api.person()
    await create_data(ada)
    id = await id_of(ada)
    cached = api.state["users"]._cached[ada.subject].user
    await as_system(api, *((lifecycle.erase, id) if end == "erase" else (lifecycle.purge, id, NOW)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.state["users"], "resolve", lambda _: asyncio.sleep(0, cached))
        responses = [
            await ada.post(TASKS, {"title": "late"}),
            await ada.put(f"{TASKS}/{uuid4()}", {"title": "late", "tags": ["late"]}),
            await ada.post("/api/v1/tags", {"name": "late"}),
        ]
        assert {response.status_code for response in responses} == {409}
        assert (await ada.get(TASKS)).json()["items"] == []
    assert not any((await count_rows(api, id)).values())


async def test_a_concurrent_write_is_erased_with_the_account(api: Api) -> None:
    """The erasure waits for the write and deletes its row."""
    ada = api.person()
    await ada.task()
    id = await id_of(ada)
    locked, commit = asyncio.Event(), asyncio.Event()

    async def write(transaction: Transaction) -> None:
        insert = raw("INSERT INTO tasks (owner_id, title, status, priority) VALUES (:id, 'late', 'todo', 'low')")
        await transaction.rows(insert, id=id)
        locked.set()
        await commit.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(as_system(api, write))
        await locked.wait()
        erasure = tasks.create_task(as_system(api, lifecycle.erase, id))
        await until_blocked(api, erasure)
        commit.set()
    assert not any((await count_rows(api, id)).values())


async def test_an_erasure_restores_neither_roles_nor_tokens(api: Api) -> None:
    """A demoted administrator does not regain the role by erasing the account and using an earlier token."""
    old = api.person(role="admin", name="Ada", iat=NOW.timestamp() - 60)
    ada = Person(api, old.subject, {"role": "user", "iat": NOW.timestamp()})
    assert (await old.get(ME)).json()["roles"] == ["admin"]
    assert (await ada.get(ME)).json()["roles"] == ["user"]
    id = await id_of(ada)
    await as_system(api, lifecycle.revoke_tokens, id, NOW - timedelta(seconds=90))
    await as_system(api, lifecycle.erase, id)
    api.state["users"].invalidate(ada.subject)
    stolen = {"Authorization": f"Bearer {old.token(iat=NOW.timestamp() - 100)}"}
    assert (await old.get(ME, headers=stolen)).status_code == 401
    assert (await old.get(ME)).json()["roles"] == ["user"]
    promoted = {"Authorization": f"Bearer {ada.token(role='admin', iat=NOW.timestamp() + 1)}"}
    assert (await ada.get(ME, headers=promoted)).json()["roles"] == ["admin"]


async def test_relevant_changes_send_a_notification_and_others_do_not(api: Api, database_url: str) -> None:
    """Including direct updates in SQL."""
    ada = api.person(name="Ada")
    await ada.get(ME)
    changes = {
        "status = 'suspended'": 1,
        "roles = '{admin}'": 1,
        "tokens_valid_after = now()": 1,
        "name = 'Eve', locale = 'de', updated_at = now()": 0,
        "status = 'suspended', roles = '{admin}'": 0,
        "banned = true": 1,
        "suspended_here = false": 1,
        "banned_at = now()": 0,
        "id = uuidv7()": 1,
    }
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("LISTEN users")
        for change, expected in changes.items():
            update = f"UPDATE users SET {change} WHERE subject = %s".encode()  # noqa: S608  # of this test
            await connection.execute(update, (ada.subject,))
            await connection.execute("SELECT")  # its response comes after all notifications
            assert [n.payload async for n in connection.notifies(timeout=0)] == [ada.subject] * expected, change
        await connection.execute("DELETE FROM users WHERE subject = %s", (ada.subject,))
        await connection.execute("SELECT")
        assert [n.payload async for n in connection.notifies(timeout=0)] == [ada.subject]
