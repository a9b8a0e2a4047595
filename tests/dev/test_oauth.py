"""The OAuth provider issues real access tokens to users and to machine clients."""

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


async def test_a_user_grants_scopes(better_auth_oauth: Issuer, oauth: OAuthClient, person: Session) -> None:
    response = await oauth.authorization_code(person, scope="openid tasks:read", resource=API)
    granted = claims(response["access_token"], better_auth_oauth)
    assert granted["sub"] == person.user_id
    assert granted["scope"] == response["scope"] == "openid tasks:read"
    assert granted["aud"] == [API, f"{better_auth_oauth.base_url}/oauth2/userinfo"]
    assert {"client_id", "jti", "sid", "iat", "exp"} <= granted.keys()
    assert "email" not in granted
    assert jwt.get_unverified_header(response["id_token"]).get("typ") is None


async def test_jwt_and_access_token_name_the_same_user(better_auth_oauth: Issuer, person: Session) -> None:
    async with People(better_auth_oauth.base_url) as people:
        token = await people.token(person)
    payload = jwt.decode(token, options={"verify_signature": False})
    assert (payload["sub"], payload["iss"]) == (person.user_id, better_auth_oauth.iss)
    assert better_auth_oauth.iss != better_auth_oauth.base_url
    assert "createdAt" in payload  # Better Auth's default payload; the reference configuration defines its own


async def test_a_refresh_token_yields_a_new_access_token(
    better_auth_oauth: Issuer, oauth: OAuthClient, person: Session
) -> None:
    first = await oauth.authorization_code(person, scope="offline_access tasks:write", resource=API)
    second = await oauth.refresh(first["refresh_token"], resource=API)
    before, after = (claims(response["access_token"], better_auth_oauth) for response in (first, second))
    assert before["jti"] != after["jti"]
    assert (before["sub"], before["scope"]) == (after["sub"], after["scope"])


async def test_a_machine_client_is_its_own_subject(better_auth_oauth: Issuer, oauth: OAuthClient) -> None:
    response = await oauth.client_credentials(scope="tasks:read", resource=API)
    granted = claims(response["access_token"], better_auth_oauth)
    assert granted["sub"] == granted["client_id"] == better_auth_oauth.client["client_id"]
    assert "sid" not in granted


async def test_without_a_resource_the_token_is_opaque(oauth: OAuthClient, person: Session) -> None:
    for response in (
        await oauth.authorization_code(person, scope="tasks:read"),
        await oauth.client_credentials(scope="tasks:read"),
    ):
        assert "." not in response["access_token"]


async def test_an_unknown_scope_or_resource_is_refused(oauth: OAuthClient, person: Session) -> None:
    with pytest.raises(Refused, match="invalid_scope"):
        await oauth.authorization_code(person, scope="tasks:own", resource=API)
    with pytest.raises(Refused, match="invalid_target"):
        await oauth.client_credentials(scope="tasks:read", resource="http://localhost:9999")


async def test_a_user_cannot_create_clients(better_auth_oauth: Issuer, person: Session) -> None:
    async with People(better_auth_oauth.base_url) as people:
        with pytest.raises(Refused, match="401"):
            await people.request(
                "POST", "/oauth2/create-client", person.authorization, redirect_uris=["https://evil.example.com"]
            )
