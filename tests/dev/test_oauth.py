"""The OAuth provider issues real access tokens, for people and for machines."""

from collections.abc import AsyncIterator

import httpx
import jwt
import pytest

from backend.dev.issuer import Issuer
from backend.dev.oauth import OAuthClient
from backend.dev.people import People, Refused, Session

API = "http://localhost:8000"


@pytest.fixture(scope="module")
async def person(better_auth_oauth: Issuer) -> AsyncIterator[Session]:
    async with People(better_auth_oauth.base_url) as people:
        yield await people.sign_up("ada@example.com")


def claims(token: str, issuer: Issuer) -> dict[str, object]:
    assert jwt.get_unverified_header(token)["typ"] == "at+jwt"
    key = jwt.PyJWKSet.from_dict(httpx.get(issuer.jwks_url).json())[jwt.get_unverified_header(token)["kid"]]
    return jwt.decode(token, key, algorithms=[key.algorithm_name], issuer=issuer.base_url, audience=API)


async def test_a_person_grants_scopes(better_auth_oauth: Issuer, oauth: OAuthClient, person: Session) -> None:
    answer = await oauth.authorization_code(person, scope="openid tasks:read", resource=API)
    granted = claims(answer["access_token"], better_auth_oauth)
    assert granted["sub"] == person.user_id
    assert granted["scope"] == answer["scope"] == "openid tasks:read"
    assert granted["aud"] == [API, f"{better_auth_oauth.base_url}/oauth2/userinfo"]
    assert {"client_id", "jti", "sid", "iat", "exp"} <= granted.keys()
    assert "email" not in granted
    assert jwt.get_unverified_header(answer["id_token"]).get("typ") is None


async def test_both_kinds_of_token_name_one_person(better_auth_oauth: Issuer, person: Session) -> None:
    async with People(better_auth_oauth.base_url) as people:
        token = await people.token(person)
    payload = jwt.decode(token, options={"verify_signature": False})
    assert (payload["sub"], payload["iss"]) == (person.user_id, better_auth_oauth.iss)
    assert better_auth_oauth.iss != better_auth_oauth.base_url
    assert "createdAt" in payload  # Better Auth's own payload, unlike the reference configuration's


async def test_a_refresh_token_brings_another(better_auth_oauth: Issuer, oauth: OAuthClient, person: Session) -> None:
    first = await oauth.authorization_code(person, scope="offline_access tasks:write", resource=API)
    second = await oauth.refresh(first["refresh_token"], resource=API)
    before, after = (claims(answer["access_token"], better_auth_oauth) for answer in (first, second))
    assert before["jti"] != after["jti"]
    assert (before["sub"], before["scope"]) == (after["sub"], after["scope"])


async def test_a_machine_is_its_own_subject(better_auth_oauth: Issuer, oauth: OAuthClient) -> None:
    answer = await oauth.client_credentials(scope="tasks:read", resource=API)
    granted = claims(answer["access_token"], better_auth_oauth)
    assert granted["sub"] == granted["client_id"] == better_auth_oauth.client["client_id"]
    assert "sid" not in granted


async def test_without_a_resource_the_token_is_opaque(oauth: OAuthClient, person: Session) -> None:
    for answer in (
        await oauth.authorization_code(person, scope="tasks:read"),
        await oauth.client_credentials(scope="tasks:read"),
    ):
        assert "." not in answer["access_token"]


async def test_what_is_not_allowed_is_refused(oauth: OAuthClient, person: Session) -> None:
    with pytest.raises(Refused, match="invalid_scope"):
        await oauth.authorization_code(person, scope="tasks:own", resource=API)
    with pytest.raises(Refused, match="invalid_target"):
        await oauth.client_credentials(scope="tasks:read", resource="http://localhost:9999")


async def test_nobody_else_makes_clients(better_auth_oauth: Issuer, person: Session) -> None:
    async with People(better_auth_oauth.base_url) as people:
        with pytest.raises(Refused, match="401"):
            await people.request(
                "POST", "/oauth2/create-client", person.authorization, redirect_uris=["https://evil.example.com"]
            )
