"""OAuth access tokens of a real provider: users, scopes, machine clients, roles."""

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from uuid import uuid4

import httpx
import pytest
from jwt import decode

from backend.auth.testing import LocalIssuer
from backend.dev.issuer import Issuer
from backend.dev.oauth import OAuthClient
from backend.dev.people import People, Session
from backend.settings import Settings
from tests.conftest import Api, running
from tests.contract.test_better_auth import ME, TASKS, call, newer_token_by_cookie, settings_for
from tests.support.issuers import ADMIN
from tests.users.test_users import rows_of

API = "http://localhost:8000"
USERS = "/api/v1/admin/users"


@pytest.fixture(scope="module")
async def api(better_auth_oauth: Issuer, settings: Settings, issuer: LocalIssuer) -> AsyncIterator[Api]:
    async with running(settings_for(better_auth_oauth, settings), issuer) as api:
        yield api


@pytest.fixture
async def session(better_auth_oauth: Issuer) -> AsyncIterator[Session]:
    async with People(better_auth_oauth.base_url) as people:
        yield await people.sign_up(f"{uuid4().hex}@example.com", name="Ada")


async def granted(oauth: OAuthClient, session: Session, scope: str) -> str:
    token: str = (await oauth.authorization_code(session, scope=scope, resource=API))["access_token"]
    return token


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


async def test_session_and_access_tokens_belong_to_one_user(
    api: Api, better_auth_oauth: Issuer, oauth: OAuthClient, session: Session
) -> None:
    by_scope = (await call(api, await granted(oauth, session, "openid profile"))).json()
    assert (by_scope["name"], by_scope["scopes"]) == (None, ["openid", "profile"])
    async with People(better_auth_oauth.base_url) as people:
        by_session = (await call(api, await people.token(session))).json()
    assert (by_session["name"], by_session["scopes"]) == ("Ada", None)
    again = (await call(api, await granted(oauth, session, "openid profile"))).json()
    assert again["id"] == by_session["id"] == by_scope["id"]
    assert again["name"] == "Ada", "a token without profile claims clears nothing"
    assert (by_scope["issuer"], by_session["issuer"]) == (better_auth_oauth.base_url, better_auth_oauth.iss)


@pytest.mark.parametrize(
    ("scope", "method", "path", "missing"),
    [
        ("tasks:read", "GET", TASKS, None),
        ("tasks:read", "POST", TASKS, "tasks:write"),
        ("tasks:write", "POST", TASKS, None),
        ("tasks:write", "GET", TASKS, "tasks:read"),
        ("openid", "GET", TASKS, "tasks:read"),
        ("tasks:read tasks:write", "GET", ME, "profile"),
    ],
)
async def test_an_access_token_is_limited_to_its_scopes(
    api: Api, oauth: OAuthClient, session: Session, scope: str, method: str, path: str, missing: str | None
) -> None:
    body = {"title": "x"} if method == "POST" else None
    response = await call(api, await granted(oauth, session, scope), method, path, json=body)
    if missing:
        assert refusal(response) == (403, "insufficient_scope")
        assert 'error="insufficient_scope"' in response.headers["www-authenticate"]
        assert f'scope="{missing}"' in response.headers["www-authenticate"]
    else:
        assert response.status_code in (200, 201)


async def test_a_machine_client_is_refused_and_creates_no_user(api: Api, oauth: OAuthClient) -> None:
    answer = await oauth.client_credentials(scope="tasks:read", resource=API)
    token, machine = answer["access_token"], (await api.state["bearer"].verifier.verify(answer["access_token"]))
    assert machine.is_machine
    for method, path in ("GET", TASKS), ("POST", TASKS), ("GET", ME):
        assert refusal(await call(api, token, method, path)) == (403, "forbidden")
    assert await rows_of(api, machine.subject) == []


async def test_id_tokens_and_opaque_tokens_are_refused(api: Api, oauth: OAuthClient, session: Session) -> None:
    """One key signs all tokens; only the audience tells an ID token from an access token."""
    answer = await oauth.authorization_code(session, scope="openid profile", resource=API)
    assert refusal(await call(api, answer["id_token"])) == (401, "invalid_token")
    opaque = (await oauth.authorization_code(session, scope="tasks:read"))["access_token"]
    assert refusal(await call(api, opaque)) == (401, "invalid_token")


async def test_roles_in_an_access_token_are_ignored(
    api: Api, better_auth_oauth: Issuer, oauth: OAuthClient, session: Session
) -> None:
    """`customAccessTokenClaims` may add a role; stored in the user row, it would outlive the token."""
    with closing(sqlite3.connect(better_auth_oauth.database, timeout=10)) as connection, connection:
        connection.execute("UPDATE user SET role = 'admin' WHERE id = ?", (session.user_id,))
    token = await granted(oauth, session, "profile")
    assert decode(token, options={"verify_signature": False})["role"] == "admin"
    assert (await call(api, token)).json()["roles"] == []
    assert [row["roles"] for row in await rows_of(api, session.user_id)] == [[]]


async def test_a_cached_cookie_does_not_restore_a_role_under_the_default_payload(
    start_issuer: Callable[..., Issuer], settings: Settings, issuer: LocalIssuer
) -> None:
    """The default payload copies the role of `session.cookieCache`, together with its older `updatedAt`."""
    better_auth = start_issuer(oauth=True, cookie_cache=True, admin_emails=[ADMIN])
    async with running(settings_for(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        admin, session = await people.sign_up(ADMIN), await people.sign_up("ada@example.com")
        await people.request("POST", "/admin/set-role", admin.authorization, userId=session.user_id, role="admin")
        browser = await people.sign_in("ada@example.com")
        assert (await call(api, await people.token_by_cookie(browser), path=USERS)).status_code == 200
        await people.request("POST", "/admin/set-role", admin.authorization, userId=session.user_id, role="user")
        assert (await call(api, await people.token(session))).json()["roles"] == ["user"]
        stale = await newer_token_by_cookie(people, browser)
        assert decode(stale, options={"verify_signature": False})["role"] == "admin"
        assert refusal(await call(api, stale, path=USERS)) == (403, "forbidden")
        assert [row["roles"] for row in await rows_of(api, session.user_id)] == [["user"]]
