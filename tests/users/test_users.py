"""The local user row: provisioning, updates from claims, the cache, and the routes of /users/me."""

import asyncio
import gc
import json
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from backend.auth import Principal
from backend.database import SYSTEM, Database, Statement
from backend.users import lifecycle, provisioning, system_statements, token_claims
from backend.users.schemas import Me
from tests.conftest import BASE, ISSUER, Api, Person, caught_up
from tests.database.test_executor import raw

ME = "/api/v1/users/me"
NOW = int(time.time())  # before the tests
# Within a second of `iat` if read as UTC, but without an offset.
WITHOUT_OFFSET = time.strftime("%Y-%m-%dT%H:%M:%S.500", time.gmtime(NOW - 10))


def moment(seconds: float) -> str:
    """A time in Better Auth's format."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def rows_of(api: Api, subject: str) -> list[dict[str, Any]]:
    """The user rows of a subject, with the id of the transaction that wrote them."""
    statement = raw("SELECT *, cast(xmin AS text) AS written_by FROM users WHERE subject = :subject")
    return await Database(api.state["pool"], SYSTEM).rows(statement, subject=subject)


async def set_row(api: Api, subject: str, column: str, value: object) -> None:
    statement = raw(f"UPDATE users SET {column} = :value WHERE subject = :subject")  # noqa: S608  # of this file
    await Database(api.state["pool"], SYSTEM).rows(statement, value=value, subject=subject)
    api.state["users"].invalidate(subject)


async def me(person: Person, **claims: Any) -> dict[str, Any]:
    response = await person.get(ME, headers={"Authorization": f"Bearer {person.token(**claims)}"})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_me_returns_the_row_and_the_token_data(api: Api) -> None:
    ada = api.person(
        email="ada@example.com", emailVerified=True, name="Ada", role="user,admin", image="https://x.test/a.png"
    )
    user = await me(ada, iat=NOW, exp=NOW + 3000)
    assert list(user) == list(Me.model_fields)
    assert user["email"] == "ada@example.com"
    assert user["email_verified"] is True
    assert (user["name"], user["image"], user["roles"]) == ("Ada", "https://x.test/a.png", ["user", "admin"])
    assert (user["subject"], user["issuer"], user["status"]) == (ada.subject, ISSUER, "active")
    assert (user["scopes"], user["time_zone"], user["locale"], user["is_anonymous"]) == (None, None, None, False)
    assert user["expires_at"] == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW + 3000))


async def test_200_concurrent_first_requests_create_one_row(api: Api) -> None:
    ada = api.person()
    responses = await asyncio.gather(*(ada.get(ME) for _ in range(200)))
    assert {response.status_code for response in responses} == {200}
    assert len({response.json()["id"] for response in responses}) == 1
    assert len(await rows_of(api, ada.subject)) == 1


async def test_first_requests_in_several_processes_create_one_row(api: Api) -> None:
    """Each `Users` stands for one process: they share only the database."""
    ada = api.person(name="Ada")
    principal = await api.state["bearer"].verifier.verify(ada.token())
    processes = [provisioning.Users(api.state["pool"], ISSUER) for _ in range(20)]
    users = await asyncio.gather(*(process.resolve(principal) for process in processes))
    assert len({user.id for user in users}) == 1
    assert len(await rows_of(api, ada.subject)) == 1


async def test_both_issuer_names_map_to_one_row(api: Api) -> None:
    ada = api.person(name="Ada")
    by_session = await me(ada, iss=ISSUER)
    by_base = await me(ada, iss=BASE)
    assert by_session["id"] == by_base["id"]
    assert (by_session["issuer"], by_base["issuer"]) == (ISSUER, BASE)
    assert [row["issuer"] for row in await rows_of(api, ada.subject)] == [ISSUER]


async def test_an_equal_email_does_not_link_accounts(api: Api) -> None:
    ada, eve = (api.person(email="same@example.com", emailVerified=True) for _ in range(2))
    task = await ada.task()
    assert (await me(ada))["id"] != (await me(eve))["id"]
    assert (await eve.get(f"/api/v1/tasks/{task['id']}")).status_code == 404


async def test_newer_claims_update_the_row_and_older_ones_do_not(api: Api) -> None:
    ada = api.person()
    assert (await me(ada, iat=NOW - 60, name="Ada", role="admin"))["roles"] == ["admin"]
    assert (await me(ada, iat=NOW - 30, name="Ada L.", role="user"))["roles"] == ["user"]
    again = await me(ada, iat=NOW - 60, name="Ada", role="admin")
    assert (again["name"], again["roles"]) == ("Ada L.", ["user"])
    api.state["users"].invalidate(ada.subject)
    again = await me(ada, iat=NOW - 60, name="Ada", role="admin")
    assert (again["name"], again["roles"]) == ("Ada L.", ["user"])


@pytest.mark.parametrize(
    ("role", "roles"),
    [(["user"], ["user"]), (["admin", 1], []), (5, []), ({"admin": True}, []), ("admin\0", [])],
    ids=str,
)
async def test_a_role_in_any_form_replaces_the_old_one(api: Api, role: object, roles: list[str]) -> None:
    ada = api.person()
    assert (await me(ada, iat=NOW - 60, role="admin"))["roles"] == ["admin"]
    assert (await me(ada, iat=NOW - 30, role=role))["roles"] == roles
    assert (await me(ada, iat=NOW - 20))["roles"] == roles  # a token without the claim keeps them


async def test_the_roles_follow_the_newest_data_and_not_the_newest_token(api: Api) -> None:
    """With `session.cookieCache`, `jwt()` issues new tokens from an old cookie."""
    ada = api.person()
    old, new = moment(NOW - 300), moment(NOW - 60)
    assert (await me(ada, iat=NOW - 200, updatedAt=old, role="admin"))["roles"] == ["admin"]
    assert (await me(ada, iat=NOW - 50, updatedAt=new, role="user"))["roles"] == ["user"]
    for invalidate in False, True:
        if invalidate:
            api.state["users"].invalidate(ada.subject)
        assert (await me(ada, iat=NOW - 10, updatedAt=old, role="admin"))["roles"] == ["user"]
        assert (await ada.get("/api/v1/admin/users")).status_code == 403
    # A role set in SQL does not change `updatedAt`.
    assert (await me(ada, iat=NOW, updatedAt=new, role="admin"))["roles"] == ["admin"]


async def test_an_event_about_roles_does_not_block_profile_claims(api: Api) -> None:
    ada = api.person()
    changed = NOW - 60.5
    at = {"at": datetime.fromtimestamp(changed + 0.01, UTC)}
    await me(ada, iat=NOW - 200, updatedAt=moment(NOW - 300), role="admin", name="Ada")
    user_id = (await rows_of(api, ada.subject))[0]["id"]
    system = Database(api.state["pool"], SYSTEM)
    assert await system.transact(lambda transaction: lifecycle.set_roles(transaction, user_id, ["user"], **at))
    api.state["users"].invalidate(ada.subject)
    assert (await me(ada, iat=NOW - 50, updatedAt=moment(NOW - 300), role="admin", name="Ada"))["roles"] == ["user"]
    seen = await me(ada, iat=NOW - 40, updatedAt=moment(changed), role="user", name="Ada L.")
    assert (seen["roles"], seen["name"]) == (["user"], "Ada L.")


async def test_minted_at_orders_claims(api: Api) -> None:
    """A role set in SQL takes effect, and an earlier token does not restore the old one."""
    ada = api.person(updatedAt=moment(NOW - 300))
    first = {"iat": NOW - 20, "minted_at": (NOW - 20) * 1000 + 100, "role": "admin"}
    second = {"iat": NOW - 20, "minted_at": (NOW - 20) * 1000 + 101, "role": "user"}
    assert (await me(ada, **first))["roles"] == ["admin"]
    assert (await me(ada, **second))["roles"] == ["user"]
    assert (await me(ada, **first))["roles"] == ["user"]
    assert (await me(ada, iat=NOW - 10, minted_at=(NOW - 10) * 1000, role="admin"))["roles"] == ["admin"]


@pytest.mark.parametrize(
    "minted",
    ["soon", True, -1, 1e12, None, (NOW + 3600) * 1000, 10**30],
    ids=["text", "boolean", "negative", "float", "null", "after iat", "huge"],
)
async def test_an_invalid_minted_at_is_ignored(api: Api, minted: object) -> None:
    ada = api.person(iat=NOW - 10, updatedAt=moment(NOW - 60))
    await me(ada, role="admin", minted_at=minted)
    (row,) = await rows_of(api, ada.subject)
    assert row["claims_at"].timestamp() == NOW - 60


async def test_a_token_with_scopes_does_not_block_roles(api: Api) -> None:
    """Such a token has no roles itself, even with profile claims."""
    ada = api.person()
    bare = api.issuer.access_token(sub=ada.subject, scope="profile", iss=BASE, name="Ada")
    assert (await ada.get(ME, headers={"Authorization": f"Bearer {bare}"})).json()["name"] == "Ada"
    assert (await me(ada, iat=NOW, updatedAt=moment(NOW - 300), role="admin"))["roles"] == ["admin"]


async def test_updated_at_orders_claims_within_a_second(api: Api) -> None:
    ada = api.person(iat=NOW)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(NOW))
    before, after = f"{moment}.100Z", f"{moment}.900Z"
    assert (await me(ada, role="admin", updatedAt=before))["roles"] == ["admin"]
    assert (await me(ada, role="user", updatedAt=after))["roles"] == ["user"]
    assert (await me(ada, role="admin", updatedAt=before))["roles"] == ["user"]


@pytest.mark.parametrize(
    "updated",
    [WITHOUT_OFFSET, "soon", "", 5, None, "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00", ["x"]],
    ids=["no offset", "text", "empty", "number", "null", "after iat", "year 0", "array"],
)
async def test_an_invalid_updated_at_is_ignored(api: Api, updated: object) -> None:
    ada = api.person(iat=NOW - 10)
    await me(ada, name="old")
    assert (await me(ada, name="new", updatedAt=updated))["name"] == "new"
    (row,) = await rows_of(api, ada.subject)
    assert row["claims_at"].timestamp() == NOW - 10


async def test_a_row_is_written_only_when_something_changed(api: Api) -> None:
    ada = api.person(name="Ada")
    await me(ada, iat=NOW - 60)
    (before,) = await rows_of(api, ada.subject)
    for invalidate in False, True:
        if invalidate:
            api.state["users"].invalidate(ada.subject)
        await me(ada, iat=NOW - 30)
        assert await rows_of(api, ada.subject) == [before]


async def test_the_statement_itself_enforces_the_order_of_claims(api: Api) -> None:
    """Another process may have written between the read and the update."""
    ada = api.person(name="Ada")
    await me(ada, iat=NOW - 30)
    (before,) = await rows_of(api, ada.subject)
    ensure = system_statements.upsert_claims(frozenset({"name"}))
    for name, at in {"Eve": NOW - 31, "Ada": NOW}.items():
        moment = datetime.fromtimestamp(at, UTC)
        values = {"issuer": ISSUER, "subject": ada.subject, "name": name, "claims_at": moment, "said_at": moment}
        assert await Database(api.state["pool"], SYSTEM).rows(ensure, **values) == []
    assert await rows_of(api, ada.subject) == [before]


async def test_a_token_without_profile_claims_keeps_the_profile(api: Api) -> None:
    ada = api.person()
    known = await me(ada, iat=NOW - 60, name="Ada", email="ada@example.com", role="admin", emailVerified=True)
    bare = api.issuer.access_token(sub=ada.subject, scope="profile", iss=BASE)
    response = await ada.get(ME, headers={"Authorization": f"Bearer {bare}"})
    assert response.status_code == 200, response.text
    for name in "id", "name", "email", "roles", "email_verified":
        assert response.json()[name] == known[name]
    assert response.json()["scopes"] == ["profile"]


async def test_a_row_without_a_profile_accepts_an_older_one(api: Api) -> None:
    """After a first request by OAuth the row has a subject only, so an older token may fill in the profile."""
    ada = api.person()
    bare = api.issuer.access_token(sub=ada.subject, scope="profile", iss=BASE, iat=NOW, exp=NOW + 3000)
    assert (await ada.get(ME, headers={"Authorization": f"Bearer {bare}"})).json()["name"] is None
    assert (await me(ada, iat=NOW - 60, name="Ada"))["name"] == "Ada"


async def test_a_null_claim_counts_as_missing(api: Api) -> None:
    ada = api.person()
    await me(ada, iat=NOW - 60, name="Ada", role="admin", image="https://x.test/a.png")
    after = await me(ada, iat=NOW, name=None, role=None, image=None)
    assert (after["name"], after["roles"], after["image"]) == (None, [], None)


async def test_an_embedded_picture_is_not_stored(api: Api) -> None:
    ada = api.person()
    assert (await me(ada, image="data:image/png;base64," + "A" * 5000))["image"] is None
    assert len(await rows_of(api, ada.subject)) == 1


async def test_a_cached_caller_needs_no_statement(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = api.person(name="Ada")
    await ada.task()
    await caught_up(api.state["users"])
    seen: list[str] = []
    original = Database._rows

    async def watched(self: Database, statement: Statement, values: Any) -> Any:
        seen.append(statement.sql)
        return await original(self, statement, values)

    monkeypatch.setattr(Database, "_rows", watched)
    await ada.get("/api/v1/tasks")
    await ada.get("/api/v1/tasks", headers={"Authorization": f"Bearer {ada.token(iat=NOW - 1)}"})
    assert [sql.split()[0] for sql in seen] == ["SELECT", "SELECT"]
    assert all("FROM tasks" in sql for sql in seen)


async def test_claims_are_read_once_per_token_and_released_with_it(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada, users, read = api.person(name="Ada"), api.state["users"], []
    principal = await api.state["bearer"].verifier.verify(ada.token())
    profile_of = token_claims.profile_of

    def noted(principal: Principal) -> dict[str, Any]:
        read.append(principal.subject)
        return profile_of(principal)

    await users.resolve(principal)
    await caught_up(users)
    monkeypatch.setattr("backend.users.provisioning.profile_of", noted)
    for _ in range(3):
        assert (await users.resolve(principal)).profile["name"] == "Ada"
    assert not read
    other = Principal.from_claims({**principal.claims, "name": "Ada Lovelace"}, is_access_token=False)
    for _ in range(3):
        assert (await users.resolve(other)).profile["name"] == "Ada Lovelace"
    assert read == [ada.subject]
    assert users._cached[ada.subject].principal() is other
    del other
    gc.collect()
    assert users._cached[ada.subject].principal() is None


@pytest.mark.parametrize(
    "patch",
    [
        {"time_zone": "Europe/Berlin", "locale": "de-CH"},
        {"time_zone": "America/Argentina/Buenos_Aires"},
        {"time_zone": "UTC", "locale": "zh-Hant-TW"},
        {},
    ],
    ids=["both", "nested time zone", "locale with a script", "none"],
)
async def test_settings_can_be_changed(api: Api, patch: dict[str, str]) -> None:
    ada = api.person()
    before = await me(ada)
    response = await ada.patch(ME, patch)
    assert response.status_code == 200
    assert patch.items() <= response.json().items()
    assert (await me(ada))["updated_at"] == response.json()["updated_at"]
    assert (response.json()["updated_at"] > before["updated_at"]) is bool(patch)
    assert (await ada.patch(ME, patch)).json()["updated_at"] == response.json()["updated_at"]
    cleared = await ada.patch(ME, {"time_zone": None, "locale": None})
    assert (cleared.json()["time_zone"], cleared.json()["locale"]) == (None, None)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("time_zone", "Mars/Olympus"),
        ("time_zone", "../../etc/passwd"),
        ("time_zone", "localtime"),
        ("time_zone", "Europe/Berlin\0"),
        ("time_zone", ""),
        ("time_zone", 1),
        ("locale", "d"),
        ("locale", "de_CH"),
        ("locale", "x" * 200),
    ],
)
async def test_an_invalid_setting_is_a_422(api: Api, member: str, value: object) -> None:
    response = await api.person().patch(ME, {member: value})
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["body", member]


async def test_other_members_cannot_be_changed(api: Api) -> None:
    ada = api.person(name="Ada")
    before = (await ada.get(ME)).json()
    values = {"name": "Eve", "email": "eve@example.com", "roles": ["admin"], "role": "admin", "status": "active"}
    for member, value in (values | {"id": str(UUID(int=7))}).items():
        response = await ada.patch(ME, {member: value})
        assert response.status_code == 422
        assert response.json()["errors"][0]["loc"] == ["body", member]
    assert (await ada.get(ME)).json() == before


@pytest.mark.parametrize("status", ["suspended", "purged"])
async def test_an_account_that_is_not_active_is_refused(api: Api, status: str) -> None:
    ada = api.person()
    await ada.task()
    await set_row(api, ada.subject, "status", status)
    for method in "GET", "POST":
        response = await ada.request(method, "/api/v1/tasks", json={"title": "x"} if method == "POST" else None)
        assert (response.status_code, response.json()["code"]) == (403, f"account_{status}")
        assert "www-authenticate" not in response.headers


async def test_tokens_issued_before_a_revocation_are_invalid(api: Api) -> None:
    ada = api.person()
    await me(ada)
    await set_row(api, ada.subject, "tokens_valid_after", datetime.fromtimestamp(NOW - 100.5, UTC))
    for iat, status in {NOW - 200: 401, NOW - 101: 401, NOW - 100: 200, NOW: 200}.items():
        token = ada.token(iat=iat, exp=NOW + 3000)
        response = await ada.get(ME, headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == status, iat
        if status == 401:
            assert 'error="invalid_token"' in response.headers["www-authenticate"]
            assert response.json()["code"] == "invalid_token"


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"banned": True}, 403),
        ({"banned": True, "banExpires": "2001-01-01T00:00:00.000Z"}, 200),
        ({"banned": True, "banExpires": "2999-01-01T00:00:00.000Z"}, 403),
        ({"banned": True, "banExpires": "whenever"}, 403),
        ({"banned": False}, 200),
        ({"banned": None}, 200),
    ],
    ids=str,
)
async def test_banned_users_are_refused(api: Api, claims: dict[str, object], status: int) -> None:
    assert (await api.person(**claims).get(ME)).status_code == status


async def test_a_machine_token_creates_no_row(api: Api) -> None:
    token = api.issuer.access_token(sub="machine-1", client_id="machine-1", scope="tasks:read profile", iss=BASE)
    response = await api.http.get(ME, headers={"Authorization": f"Bearer {token}"})
    assert response.status_code == 403
    assert await rows_of(api, "machine-1") == []


@pytest.mark.parametrize("subject", ["x" * 255, "İstanbul 🎉", "' OR 1=1 --", "%s %(caller)s"])
async def test_any_valid_subject_is_stored(api: Api, subject: str) -> None:
    ada = api.person(sub=subject)
    assert (await me(ada))["subject"] == subject
    assert (await ada.task("mine"))["title"] == "mine"


@pytest.mark.parametrize(
    ("claim", "value", "member"), [("name", "a\0b", "name"), ("email", "\0", "email"), ("role", "admin\0", "roles")]
)
async def test_a_claim_that_cannot_be_stored_is_ignored(api: Api, claim: str, value: str, member: str) -> None:
    assert not (await me(api.person(), **{claim: value}))[member]


async def test_no_column_stores_a_password(api: Api) -> None:
    statement = raw(
        "SELECT table_name || '.' || column_name AS name FROM information_schema.columns WHERE table_schema = 'public'"
    )
    columns = [row["name"] for row in await Database(api.state["pool"], SYSTEM).rows(statement)]
    document = api.app.openapi()
    names = [*columns, *document["paths"], *json.dumps(document["components"]["schemas"]).split('"')]
    assert columns
    assert not [name for name in names if "password" in name.lower() or "sign-in" in name or "login" in name]
