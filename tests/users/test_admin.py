"""Administration: permission, suspension, lists, and the audit log."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from backend import migrations
from backend.auth.testing import LocalIssuer
from backend.database import SYSTEM, Actor, Database
from backend.settings import Settings
from backend.users import lifecycle
from backend.users.admin import service
from backend.users.admin.schemas import AuditRead, UserRead
from backend.users.provisioning import KnownUser
from backend.users.security_events.schemas import EventType
from tests.conftest import BASE, Api, Person, create_database, running
from tests.database.test_executor import raw
from tests.users.test_lifecycle import NOW, api_key_tokens, as_system, id_of, row_of
from tests.users.test_security_events import deliver, merged

ME = "/api/v1/users/me"
USERS = "/api/v1/admin/users"
AUDIT = "/api/v1/admin/audit"
OPERATIONS = [
    ("GET", USERS),
    ("GET", f"{USERS}/{{id}}"),
    ("POST", f"{USERS}/{{id}}/suspend"),
    ("POST", f"{USERS}/{{id}}/reinstate"),
    ("GET", AUDIT),
]


@pytest.fixture
def root(api: Api) -> Person:
    return api.person(role="user, admin", name="Root")


async def entries(root: Person, id: UUID) -> list[dict[str, Any]]:
    """The audit entries of a user, newest first."""
    items: list[dict[str, Any]] = (await root.get(AUDIT, params={"user_id": str(id)})).json()["items"]
    return items


async def status_of(person: Person) -> tuple[int, str | None]:
    response = await person.get(ME)
    return response.status_code, response.json().get("code")


@pytest.mark.parametrize("claims", [{}, {"role": "user"}, {"role": "Admin"}, {"role": "administrator"}], ids=str)
async def test_only_administrators_are_accepted(api: Api, claims: Mapping[str, str]) -> None:
    eve = api.person(**claims)
    id = await id_of(eve)
    for method, path in OPERATIONS:
        response = await eve.request(method, path.replace("{id}", str(id)))
        assert (response.status_code, response.json()["code"]) == (403, "forbidden"), path


async def test_an_administrators_oauth_tokens_and_api_keys_are_refused(api: Api, root: Person) -> None:
    id = await id_of(root)
    scope = "profile tasks:read tasks:write"
    access_token = api.issuer.access_token(sub=root.subject, scope=scope, iss=BASE, role="admin")
    for token in access_token, *api_key_tokens(root, scope):
        bearer = {"Authorization": f"Bearer {token}"}
        for method, path in OPERATIONS:
            response = await root.request(method, path.replace("{id}", str(id)), headers=bearer)
            assert (response.status_code, response.json()["code"]) == (403, "forbidden"), path


async def test_roles_of_an_access_token_or_an_api_key_are_ignored(api: Api) -> None:
    """A session token without a role would not remove them from the row."""
    eve = api.person()
    access_token = api.issuer.access_token(sub=eve.subject, scope="profile", iss=BASE, role="admin")
    for token in access_token, *api_key_tokens(eve, "profile", role="admin"):
        me = await eve.get(ME, headers={"Authorization": f"Bearer {token}"})
        assert (me.status_code, me.json()["roles"]) == (200, [])
        assert (await eve.get(USERS)).status_code == 403


async def test_the_role_in_the_row_decides_not_the_one_in_the_token(api: Api, root: Person) -> None:
    """A demoted administrator still has a token with the role."""
    assert (await root.get(USERS)).status_code == 200
    id = await id_of(root)
    await as_system(api, lifecycle.set_roles, id, ["user"], datetime.now(UTC) + timedelta(seconds=1))
    api.state["users"].invalidate(root.subject)
    for method, path in OPERATIONS:
        response = await root.request(method, path.replace("{id}", str(uuid4())))
        assert (response.status_code, response.json()["code"]) == (403, "forbidden"), path


async def test_administrators_can_read_a_user(api: Api, root: Person) -> None:
    ada = api.person(name="Ada", email="ada@example.com", emailVerified=True, role="user")
    id = await id_of(ada)
    response = await root.get(f"{USERS}/{id}")
    assert response.status_code == 200
    user = response.json()
    assert list(user) == list(UserRead.model_fields)
    assert (user["id"], user["subject"], user["email"], user["roles"]) == (
        str(id), ada.subject, "ada@example.com", ["user"],
    )  # fmt: skip
    for unknown in uuid4(), "1":
        assert (await root.get(f"{USERS}/{unknown}")).json()["code"] == "not_found"


async def test_a_user_can_be_suspended_and_reinstated(api: Api, root: Person) -> None:
    ada = api.person()
    id = await id_of(ada)
    steps = [("suspend", "suspended", (403, "account_suspended")), ("reinstate", "active", (200, None))]
    for action, status, expected in steps:
        for _ in range(2):
            response = await root.post(f"{USERS}/{id}/{action}", headers={"X-Request-ID": action})
            assert (response.status_code, response.json()["status"]) == (200, status)
            assert await status_of(ada) == expected
    logged = await entries(root, id)
    assert [(entry["action"], entry["request_id"]) for entry in logged] == [
        *[("reinstate", "reinstate")] * 2,
        *[("suspend", "suspend")] * 2,
    ]
    for entry in logged:
        assert (entry["source"], entry["actor"], entry["subject"]) == ("admin", str(await id_of(root)), ada.subject)


async def test_the_end_of_a_ban_does_not_end_a_suspension(api: Api, root: Person) -> None:
    """Nor does reinstating end a ban. Every action has an audit entry."""
    ada = api.person()
    id = await id_of(ada)
    now = time.time()
    await deliver(api, ada.subject, EventType.account_disabled, toe=now - 3)
    suspended = (await root.post(f"{USERS}/{id}/suspend")).json()
    assert (suspended["status"], suspended["suspended_here"], suspended["banned"]) == ("suspended", True, True)
    await deliver(api, ada.subject, EventType.account_enabled, toe=now - 1)
    assert await status_of(ada) == (403, "account_suspended")
    assert (await root.post(f"{USERS}/{id}/reinstate")).json()["status"] == "active"
    assert await status_of(ada) == (200, None)
    await deliver(api, ada.subject, EventType.account_disabled, toe=now - 0.5)
    reinstated = (await root.post(f"{USERS}/{id}/reinstate")).json()
    assert (reinstated["status"], reinstated["suspended_here"], reinstated["banned"]) == ("suspended", False, True)
    assert await status_of(ada) == (403, "account_suspended")
    assert [entry["action"] for entry in await entries(root, id)] == [
        "reinstate", "account-disabled", "reinstate", "account-enabled", "suspend", "account-disabled",
    ]  # fmt: skip


async def test_a_suspended_guest_stays_suspended_after_signing_up(api: Api, root: Person) -> None:
    guest, ada = api.person(isAnonymous=True), api.person()
    await guest.task()
    await root.post(f"{USERS}/{await id_of(guest)}/suspend")
    await deliver(api, guest.subject, merged(ada.subject))
    assert await status_of(ada) == (403, "account_suspended")
    id = (await row_of(api, ada.subject))["id"]
    (entry,) = await entries(root, id)
    assert (entry["action"], entry["source"], entry["details"]) == (
        "suspend", "event", {"merged_from": guest.subject},
    )  # fmt: skip
    assert (await root.post(f"{USERS}/{id}/reinstate")).json()["status"] == "active"
    assert await status_of(ada) == (200, None)


async def test_administrators_cannot_suspend_themselves(root: Person) -> None:
    response = await root.post(f"{USERS}/{await id_of(root)}/suspend")
    assert (response.status_code, response.json()["code"]) == (409, "own_account")
    assert (await root.post(f"{USERS}/{await id_of(root)}/reinstate")).status_code == 200


async def test_purged_accounts_cannot_be_suspended_or_reinstated(api: Api, root: Person) -> None:
    ada = api.person(name="Ada")
    await as_system(api, lifecycle.purge, await id_of(ada), NOW)
    id = (await row_of(api, ada.subject))["id"]
    for action in "suspend", "reinstate":
        response = await root.post(f"{USERS}/{id}/{action}")
        assert (response.status_code, response.json()["code"]) == (409, "purged_account")
        assert (await root.post(f"{USERS}/{uuid4()}/{action}")).json()["code"] == "not_found"
    assert (await root.get(f"{USERS}/{id}")).json()["status"] == "purged"


async def test_no_change_is_committed_without_its_audit_entry(
    api: Api, root: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = api.person()
    id = await id_of(ada)

    async def failing(*_: object, **__: object) -> None:
        raise psycopg.errors.InsufficientPrivilege

    monkeypatch.setattr(service, "record", failing)
    assert (await root.post(f"{USERS}/{id}/suspend")).status_code == 500
    assert await status_of(ada) == (200, None)


async def test_concurrent_suspensions_are_all_in_the_audit_log(api: Api, root: Person) -> None:
    id = await id_of(api.person())
    responses = await asyncio.gather(*(root.post(f"{USERS}/{id}/suspend") for _ in range(5)))
    assert {response.status_code for response in responses} == {200}
    assert [entry["action"] for entry in await entries(root, id)] == ["suspend"] * 5


@asynccontextmanager
async def separate_api(settings: Settings, issuer: LocalIssuer, postgres: str) -> AsyncIterator[Api]:
    """An API on a database without administrators of other tests."""
    url = create_database(postgres, f"admin_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    async with running(settings.model_copy(update={"database_url": url}), issuer) as api:
        yield api


@pytest.mark.parametrize("count", [2, 3])
async def test_administrators_who_suspend_each_other_concurrently_leave_one(
    settings: Settings, issuer: LocalIssuer, postgres: str, count: int
) -> None:
    """Each one suspends the next, many times. A suspended administrator cannot act."""
    async with separate_api(settings, issuer, postgres) as api:
        ring = [api.person(role="admin") for _ in range(count)]
        ids = [await id_of(person) for person in ring]
        reinstate_all = raw("UPDATE users SET status = 'active'")
        active = raw("SELECT id FROM users WHERE status = 'active'")
        system = Database(api.state["pool"], SYSTEM)
        refusals = set()
        for _ in range(100):
            responses = await asyncio.gather(
                *(person.post(f"{USERS}/{id}/suspend") for person, id in zip(ring, ids[1:] + ids[:1], strict=True))
            )
            left = await system.rows(active)
            assert left
            assert len(left) == count - sum(response.is_success for response in responses)
            refused = [response for response in responses if not response.is_success]
            refusals |= {(response.status_code, response.json()["code"]) for response in refused}
            await system.rows(reinstate_all)
            api.state["users"].invalidate_all()
        assert refusals <= {(409, "last_administrator"), (403, "account_suspended")}
        assert refusals, "no two suspensions were concurrent"


async def post_after_change(
    api: Api, monkeypatch: pytest.MonkeyPatch, actor: Person, change: str, path: str
) -> tuple[int, str | None]:
    """The response to a request that was authorized just before this change of the actor's row."""
    await actor.get(ME)
    known = KnownUser.of(await row_of(api, actor.subject))
    update = raw(f"UPDATE users SET {change} WHERE subject = :subject")  # noqa: S608  # of this test
    await Database(api.state["pool"], SYSTEM).rows(update, subject=actor.subject)
    with monkeypatch.context() as patched:
        patched.setattr(api.state["users"], "resolve", lambda _: asyncio.sleep(0, known))
        response = await actor.post(path)
    return response.status_code, response.json().get("code")


@pytest.mark.parametrize("action", ["suspend", "reinstate"])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("suspended_here = true", "account_suspended"),
        ("banned = true", "account_suspended"),
        ("roles = '{user}'", "forbidden"),
        ("status = 'purged', id = uuidv7()", "forbidden"),
    ],
    ids=["suspended", "banned", "demoted", "purged"],
)
async def test_former_administrators_cannot_do_anything(
    api: Api, root: Person, monkeypatch: pytest.MonkeyPatch, action: str, change: str, code: str
) -> None:
    """Not even in a request that is already authorized."""
    await root.get(ME)
    other, ada = api.person(role="admin"), api.person()
    id = await id_of(ada)
    assert await post_after_change(api, monkeypatch, other, change, f"{USERS}/{id}/{action}") == (403, code)
    assert await entries(root, id) == []


async def test_the_last_administrator_cannot_be_suspended(
    settings: Settings, issuer: LocalIssuer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with separate_api(settings, issuer, postgres) as api:
        root, other, banned = (api.person(role="admin") for _ in range(3))
        id = await id_of(root)
        await as_system(api, lifecycle.set_banned, await id_of(banned), True, NOW)
        path, suspended = f"{USERS}/{id}/suspend", "suspended_here = true"
        assert await post_after_change(api, monkeypatch, other, suspended, path) == (409, "last_administrator")
        assert await status_of(root) == (200, None)
        assert (await root.post(path)).json()["code"] == "own_account"


async def walk(root: Person, path: str, **query: str | int) -> list[dict[str, Any]]:
    """All items of a list, page by page."""
    items: list[dict[str, Any]] = []
    response = await root.get(path, params=query)
    while True:
        assert response.status_code == 200, response.text
        page = response.json()
        assert len(page["items"]) <= int(query.get("limit", 20))
        items += page["items"]
        if page["next_cursor"] is None:
            assert "link" not in response.headers
            return items
        address = response.headers["link"].partition(">")[0].removeprefix("<")
        response = await root.get(address)


async def test_users_are_listed_in_pages_and_can_be_filtered(api: Api, root: Person) -> None:
    mark = uuid4().hex
    people = [api.person(name=f"{mark.upper()} {n}", email=f"{n}@example.com") for n in range(7)]
    people += [api.person(name=f"none {n}", email=f"{mark}-{n}@Straße.example") for n in range(2)]
    ids = [str(await id_of(person)) for person in people]
    users = await walk(root, USERS, q=mark, limit=2)
    assert [user["id"] for user in users] == ids[::-1]
    await root.post(f"{USERS}/{ids[0]}/suspend")
    assert [user["id"] for user in await walk(root, USERS, q=mark, status="suspended")] == ids[:1]
    assert len(await walk(root, USERS, q=mark, status="active", limit=3)) == 8
    assert len(await walk(root, USERS, q=f"{mark}-1@STRASSE")) == 1
    for wildcard in "%", "_" * 24:
        assert await walk(root, USERS, q=f"{mark[:4]}{wildcard}{mark[-4:]}") == []


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (USERS, {"status": "unknown"}),
        (USERS, {"q": "x" * 201}),
        (USERS, {"q": "\0"}),
        (USERS, {"limit": "0"}),
        (USERS, {"sort": "name"}),
        (AUDIT, {"user_id": "1"}),
        (AUDIT, {"action": "suspend"}),
        (AUDIT, {"cursor": "x"}),
    ],
    ids=str,
)
async def test_invalid_queries_are_refused(root: Person, path: str, query: dict[str, str]) -> None:
    response = await root.get(path, params=query)
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["query", next(iter(query))]


async def test_a_cursor_is_bound_to_its_list(api: Api, root: Person) -> None:
    for person in api.person(), api.person():
        await id_of(person)
    cursor = (await root.get(USERS, params={"limit": 1})).json()["next_cursor"]
    for path, query in (AUDIT, {}), (USERS, {"status": "active"}):
        response = await root.get(path, params={"cursor": cursor, **query})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")


async def test_the_audit_log_is_listed_in_pages(api: Api, root: Person) -> None:
    id = await id_of(api.person())
    for _ in range(3):
        for action in "suspend", "reinstate":
            await root.post(f"{USERS}/{id}/{action}")
    logged = await walk(root, AUDIT, user_id=str(id), limit=2)
    assert [entry["action"] for entry in logged] == ["reinstate", "suspend"] * 3
    assert list(logged[0]) == list(AuditRead.model_fields)
    assert len({entry["id"] for entry in logged}) == 6
    everything = await root.get(AUDIT, params={"limit": 100})
    assert {entry["id"] for entry in logged} <= {entry["id"] for entry in everything.json()["items"]}


async def test_the_audit_log_names_an_impersonator_of_an_administrator(api: Api) -> None:
    id = await id_of(api.person())
    impersonated = api.person(role="admin", impersonatedBy="boss")
    for action in "suspend", "reinstate":
        assert (await impersonated.post(f"{USERS}/{id}/{action}")).status_code == 200
    assert [entry["details"] for entry in await entries(impersonated, id)] == [{"impersonated_by": "boss"}] * 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_log SET action = 'x'",
        "DELETE FROM audit_log",
        "TRUNCATE audit_log",
        "DELETE FROM audit_log WHERE false",
    ],
    ids=["update", "delete", "truncate", "delete nothing"],
)
async def test_audit_entries_cannot_be_changed(api: Api, root: Person, database_url: str, change: str) -> None:
    """The system role lacks the privilege, and a trigger stops a superuser."""
    await root.post(f"{USERS}/{await id_of(api.person())}/suspend")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
        await Database(api.state["pool"], SYSTEM).rows(raw(change))
    with (
        psycopg.connect(database_url, autocommit=True) as superuser,
        pytest.raises(psycopg.errors.InsufficientPrivilege, match="written once"),
    ):
        superuser.execute(change.encode())


@pytest.mark.parametrize("table", ["audit_log", "security_events", "erasures"])
async def test_users_cannot_access_system_tables(api: Api, table: str) -> None:
    database = Database(api.state["pool"], Actor.user(await id_of(api.person())))
    for statement in f"SELECT * FROM {table}", f"INSERT INTO {table} DEFAULT VALUES", f"DELETE FROM {table}":  # noqa: S608  # of this test
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
            await database.rows(raw(statement))
