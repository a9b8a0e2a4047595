"""The API with a real Better Auth server: tokens, users, roles and keys."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest

from backend.auth.testing import ALGORITHMS, LocalIssuer
from backend.dev.issuer import Issuer
from backend.dev.people import People, Refused, Session
from backend.settings import Settings
from tests.conftest import Api, running

TASKS = "/api/v1/tasks"
ME = "/api/v1/users/me"


def settings_for(issuer: Issuer, settings: Settings) -> Settings:
    """Settings that name the issuer by its address only."""
    return Settings(
        _env_file=None,
        database_url=settings.database_url,
        database_pool_size=5,
        better_auth_url=issuer.url,
    )


@pytest.fixture(scope="module")
async def api(better_auth: Issuer, settings: Settings, issuer: LocalIssuer) -> Any:
    async with running(settings_for(better_auth, settings), issuer) as api:
        yield api


def with_token(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def call(api: Api, token: str, method: str = "GET", path: str = ME, **options: Any) -> httpx.Response:
    return await api.http.request(method, path, headers=with_token(token), **options)


async def newer_token_by_cookie(people: People, session: Session) -> str:
    """A token whose `iat` is later than everything that has happened so far."""
    now = time.time()
    while jwt.decode(token := await people.token_by_cookie(session), options={"verify_signature": False})["iat"] <= now:
        pass
    return token


async def test_tokens_by_cookie_and_by_bearer_belong_to_one_user(api: Api, people: People) -> None:
    email = f"{uuid4().hex}@example.com"
    session = await people.sign_up(email, name="Ada Lovelace")
    seen = []
    for token in await people.token_by_cookie(session), await people.token(session):
        made = await call(api, token, "POST", TASKS, json={"title": "Buy milk"})
        assert made.status_code == 201, made.text
        me = (await call(api, token)).json()
        seen.append(me["id"])
        assert (me["email"], me["email_verified"], me["name"]) == (email, False, "Ada Lovelace")
        assert (me["subject"], me["roles"], me["scopes"]) == (session.user_id, ["user"], None)
    assert len(set(seen)) == 1
    again = await people.token(await people.sign_in(email))
    listed = (await call(api, again, path=TASKS)).json()["items"]
    assert [task["title"] for task in listed] == ["Buy milk"] * 2


async def test_session_tokens_and_cookies_are_refused_with_a_hint(
    api: Api, better_auth: Issuer, people: People
) -> None:
    session = await people.sign_up(f"{uuid4().hex}@example.com")
    response = await call(api, session.bearer)
    assert response.status_code == 401
    assert f"exchange it at {better_auth.base_url}/token" in response.headers["www-authenticate"]
    assert (await api.http.get(ME, headers=session.cookie)).status_code == 401


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_tokens_of_every_algorithm_are_verified(
    start_issuer: Callable[..., Issuer], settings: Settings, issuer: LocalIssuer, algorithm: str
) -> None:
    better_auth = start_issuer(key_algorithm=algorithm)
    async with running(settings_for(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        token = await people.token(await people.sign_up("ada@example.com"))
        assert jwt.get_unverified_header(token)["alg"] == algorithm
        assert (await call(api, token, "POST", TASKS, json={"title": algorithm})).status_code == 201
        forged = token[:-8] + ("A" * 8 if token[-8:] != "A" * 8 else "B" * 8)
        assert (await call(api, forged)).status_code == 401


async def test_a_session_gets_no_token_after_sign_out(api: Api, people: People) -> None:
    session = await people.sign_up(f"{uuid4().hex}@example.com")
    token = await people.token(session)
    await people.sign_out(session)
    with pytest.raises(Refused, match="401"):
        await people.token(session)
    with pytest.raises(Refused, match="401"):
        await people.token_by_cookie(session)
    assert (await call(api, token)).status_code == 200, "the last token expires within 15 minutes"


async def test_a_changed_name_is_stored_with_the_next_token(api: Api, people: People) -> None:
    session = await people.sign_up(f"{uuid4().hex}@example.com", name="Ada")
    old = await people.token(session)
    assert (await call(api, old)).json()["name"] == "Ada"
    await people.request("POST", "/update-user", session.authorization, name="Ada L.")
    new = await people.token(session)
    for token in new, old, new:
        assert (await call(api, token)).json()["name"] == "Ada L."


async def test_an_older_token_does_not_restore_a_removed_role(api: Api, people: People, admin: Session) -> None:
    """Both tokens may have the same `iat`; the user's `updatedAt` orders them."""
    session = await people.sign_up(f"{uuid4().hex}@example.com")
    tokens = []
    for role in "admin", "user":
        await people.request("POST", "/admin/set-role", admin.authorization, userId=session.user_id, role=role)
        tokens.append(await people.token(session))
        assert (await call(api, tokens[-1])).json()["roles"] == [role]
    assert (await call(api, tokens[0])).json()["roles"] == ["user"]


async def test_a_banned_user_gets_no_token(api: Api, better_auth: Issuer, people: People, admin: Session) -> None:
    """Better Auth's ban route also ends the session; after a ban by SQL the session lives on but gets no token."""
    banned, written = [await people.sign_up(f"{uuid4().hex}@example.com") for _ in range(2)]
    await people.request("POST", "/admin/ban-user", admin.authorization, userId=banned.user_id)
    with pytest.raises(Refused, match="401"):
        await people.token(banned)
    assert (await call(api, await people.token(written))).status_code == 200
    with closing(sqlite3.connect(better_auth.database, timeout=10)) as connection, connection:
        connection.execute("UPDATE user SET banned = 1 WHERE id = ?", (written.user_id,))
    for token in people.token, people.token_by_cookie:
        with pytest.raises(Refused, match="401"):
            await token(written)


async def test_the_access_log_names_the_impersonator(
    api: Api, people: People, admin: Session, caplog: pytest.LogCaptureFixture
) -> None:
    session = await people.sign_up(f"{uuid4().hex}@example.com")
    response = await people.request("POST", "/admin/impersonate-user", admin.authorization, userId=session.user_id)
    bearer = {"Authorization": f"Bearer {response.headers['set-auth-token']}"}
    token: str = (await people.request("GET", "/token", bearer)).json()["token"]
    caplog.set_level("INFO", "backend.access")
    assert (await call(api, token)).json()["subject"] == session.user_id
    assert (await call(api, token, "POST", TASKS, json={"title": "impersonated"})).status_code == 201
    await asyncio.sleep(0)  # the access log is written in the next iteration of the loop
    lines = [record.fields for record in caplog.records[-2:]]  # type: ignore[attr-defined]  # our log's extra
    assert [(line["method"], line["impersonator"]) for line in lines] == [
        (method, admin.user_id) for method in ("GET", "POST")
    ]


async def test_an_anonymous_user_can_create_tasks(api: Api, people: People) -> None:
    token = await people.token(await people.sign_in_anonymously())
    me = (await call(api, token)).json()
    assert me["is_anonymous"] is True
    assert (await call(api, token, "POST", TASKS, json={"title": "x"})).status_code == 201


@pytest.mark.parametrize(
    "options", [{"url": "http://localhost:0/auth/v1"}, {"serial_ids": True}], ids=["base path", "serial ids"]
)
async def test_other_configurations_of_better_auth_work(
    start_issuer: Callable[..., Issuer], settings: Settings, issuer: LocalIssuer, options: dict[str, Any]
) -> None:
    better_auth = start_issuer(**options)
    async with running(settings_for(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        token = await people.token(await people.sign_up("ada@example.com"))
        assert (await call(api, token)).status_code == 200


async def test_a_token_of_another_server_with_the_same_issuer_is_refused(
    api: Api, start_issuer: Callable[..., Issuer], better_auth: Issuer
) -> None:
    """Its issuer and audience match, but its keys are not in the key set."""
    impostor = start_issuer(url=better_auth.url)
    async with People(f"http://localhost:{impostor.port}/api/auth") as people:
        people._client.headers["Host"] = better_auth.url.removeprefix("http://")
        session = await people.sign_up("eve@example.com")
        response = await call(api, await people.token(session))
    assert response.status_code == 401
    assert 'error="invalid_token"' in response.headers["www-authenticate"]


async def test_an_api_that_started_before_the_issuer_recovers(
    start_issuer: Callable[..., Issuer], settings: Settings, issuer: LocalIssuer
) -> None:
    better_auth = start_issuer()
    async with People(better_auth.base_url) as people:
        token = await people.token(await people.sign_up("ada@example.com"))
    better_auth.stop()
    async with running(settings_for(better_auth, settings), issuer) as api:
        response = await call(api, token)
        assert (response.status_code, response.json()["code"]) == (503, "keys_unavailable")
        better_auth.start()
        while (response := await call(api, token)).status_code == 503:  # noqa: ASYNC110  # obeys Retry-After
            await asyncio.sleep(int(response.headers["retry-after"]))
        assert response.status_code == 200
