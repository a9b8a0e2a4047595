"""API keys of a real Better Auth: tokens are limited to the permissions and the lifetime of the key."""

import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import jwt
import pytest

from backend.auth.testing import LocalIssuer
from backend.dev.issuer import Issuer
from backend.dev.people import People, Refused, Session
from backend.settings import Settings
from tests.conftest import Api, running
from tests.contract.test_better_auth import ME, TASKS, call, settings_for
from tests.contract.test_oauth import refusal
from tests.support.issuers import ADMIN
from tests.users.test_users import rows_of

USERS = "/api/v1/admin/users"


@dataclass(frozen=True)
class Key:
    id: str
    header: dict[str, str]
    owner: Session


@dataclass(frozen=True)
class Keys:
    """Creates users with API keys that may read tasks."""

    issuer: Issuer
    people: People

    async def make(self, owner: Session | None = None) -> Key:
        owner = owner or await self.people.sign_up(f"{uuid4().hex}@example.com")
        answer = (await self.people.request("POST", "/api-key/create", owner.authorization, name="a script")).json()
        return Key(answer["id"], {"x-api-key": answer["key"]}, owner)

    async def token(self, credentials: dict[str, str]) -> str:
        token: str = (await self.people.request("GET", "/token", credentials)).json()["token"]
        return token

    async def cookie(self, key: Key) -> dict[str, str]:
        """The session cookie that Better Auth sets when the key changes the profile; its session token is the key."""
        answer = await self.people.request("POST", "/update-user", key.header, name="Ada L.")
        cookies = [cookie.split(";", 1)[0] for cookie in answer.headers.get_list("set-cookie")]
        assert any("session_data" in cookie for cookie in cookies)
        return {"Cookie": "; ".join(cookies)}

    async def delete(self, key: Key) -> None:
        await self.people.request("POST", "/api-key/delete", key.owner.authorization, keyId=key.id)

    def set(self, key: Key, column: str, value: object) -> None:
        self.sql(f"UPDATE apikey SET {column} = ? WHERE id = ?", value, key.id)  # noqa: S608  # the column is a constant of this file

    def sql(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.issuer.database, timeout=10)) as connection, connection:
            connection.execute(statement, values)


@pytest.fixture(scope="module")
def key_issuer() -> Iterator[Issuer]:
    with Issuer(oauth=True, api_keys=True, cookie_cache=True, admin_emails=[ADMIN]) as issuer:
        yield issuer


@pytest.fixture(scope="module")
async def keys(key_issuer: Issuer) -> AsyncIterator[Keys]:
    async with People(key_issuer.base_url) as people:
        yield Keys(key_issuer, people)


@pytest.fixture(scope="module")
async def api(key_issuer: Issuer, settings: Settings, issuer: LocalIssuer) -> AsyncIterator[Api]:
    async with running(settings_for(key_issuer, settings), issuer) as api:
        yield api


def payload(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


async def test_a_key_is_limited_to_its_permissions(api: Api, keys: Keys) -> None:
    owner = await keys.people.sign_up(ADMIN)
    person = await keys.people.token(owner)
    assert (await call(api, person, path=USERS)).status_code == 200
    key = await keys.make(owner)
    token = await keys.token(key.header)
    claims = payload(token)
    assert (claims["sub"], claims["key"], claims["scope"]) == (owner.user_id, key.id, "tasks:read")
    assert not {"role", "sid", "impersonatedBy"} & set(claims)
    assert (await call(api, token, path=TASKS)).status_code == 200
    assert refusal(await call(api, token, "POST", TASKS, json={"title": "x"})) == (403, "insufficient_scope")
    assert refusal(await call(api, token)) == (403, "insufficient_scope")
    for method, path in ("DELETE", ME), ("GET", f"{ME}/export"), ("GET", USERS):
        assert refusal(await call(api, token, method, path)) == (403, "forbidden")
    assert (await call(api, person, path=USERS)).status_code == 200
    assert [row["roles"] for row in await rows_of(api, owner.user_id)] == [["admin"]]


@pytest.mark.parametrize(
    ("permissions", "scope"),
    [
        (None, ""),
        ("null", ""),
        ("{}", ""),
        ('{"tasks": []}', ""),
        ('{"tasks": ["read", "write"], "notes": ["read"]}', "tasks:read tasks:write notes:read"),
        ('{"x tasks": ["write"], "tasks": ["read", "x tasks:write"]}', "tasks:read"),
    ],
    ids=str,
)
async def test_permissions_become_scopes(api: Api, keys: Keys, permissions: str | None, scope: str) -> None:
    key = await keys.make()
    keys.set(key, "permissions", permissions)
    token = await keys.token(key.header)
    assert payload(token)["scope"] == scope
    for name, method in ("tasks:read", "GET"), ("tasks:write", "POST"):
        answer = await call(api, token, method, TASKS, json={"title": "x"} if method == "POST" else None)
        assert answer.is_success is (name in scope.split())


async def test_a_token_expires_no_later_than_its_key(keys: Keys) -> None:
    key = await keys.make()
    for seconds in 60, 3600:
        expiry = int(time.time()) + seconds
        keys.set(key, "expiresAt", datetime.fromtimestamp(expiry, UTC).isoformat().replace("+00:00", "Z"))
        claims = payload(await keys.token(key.header))
        assert claims["exp"] == expiry or claims["exp"] - claims["iat"] <= 15 * 60
        assert claims["exp"] <= expiry


async def test_a_cookie_made_with_a_key_has_the_rights_of_the_key(api: Api, keys: Keys) -> None:
    key = await keys.make()
    cookie = await keys.cookie(key)
    token = await keys.token(cookie)
    assert (payload(token)["key"], payload(token)["scope"]) == (key.id, "tasks:read")
    assert refusal(await call(api, token, "DELETE", ME)) == (403, "forbidden")
    await keys.delete(key)
    session = (await keys.people.request("GET", "/get-session", cookie)).json()
    assert session["session"]["id"] == key.id, "Better Auth still accepts the cookie"
    for credentials in cookie, key.header:
        with pytest.raises(Refused, match="401"):
            await keys.token(credentials)


@pytest.mark.parametrize(
    ("column", "value"),
    [("enabled", 0), ("enabled", None), ("expiresAt", "2020-01-01T00:00:00.000Z"), ("referenceId", "another")],
)
async def test_the_cookie_of_an_invalid_key_gets_no_token(keys: Keys, column: str, value: object) -> None:
    key = await keys.make()
    cookie = await keys.cookie(key)
    await keys.token(cookie)
    keys.set(key, column, value)
    with pytest.raises(Refused, match="401"):
        await keys.token(cookie)


async def test_a_banned_user_gets_no_token_by_a_key(keys: Keys) -> None:
    key = await keys.make()
    cookie = await keys.cookie(key)
    keys.sql("UPDATE user SET banned = 1 WHERE id = ?", key.owner.user_id)
    for credentials in cookie, key.header:
        with pytest.raises(Refused, match="401"):
            await keys.token(credentials)


async def test_an_ended_session_is_not_taken_for_a_key_of_the_same_id(keys: Keys) -> None:
    """With serial ids on SQLite, the ids of sessions and of keys both count from 1."""
    key = await keys.make()
    session = await keys.people.sign_in(await email_of(keys, key.owner))
    sid = payload(await keys.people.token_by_cookie(session))["sid"]
    keys.sql("UPDATE apikey SET id = ? WHERE id = ?", sid, key.id)
    keys.sql("DELETE FROM session WHERE id = ?", sid)
    with pytest.raises(Refused, match="401"):
        await keys.people.token_by_cookie(session)
    assert payload(await keys.token(key.header))["key"] == sid


async def email_of(keys: Keys, owner: Session) -> str:
    session = (await keys.people.request("GET", "/get-session", owner.authorization)).json()
    email: str = session["user"]["email"]
    return email
