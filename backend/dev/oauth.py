"""An OAuth 2.1 client for the provider of `Issuer(oauth=True)`, with every grant that yields an access token."""

import base64
import hashlib
import secrets
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import httpx

from backend.dev.people import Refused, Session, no_cookies


class OAuthClient:
    """A confidential client: `async with OAuthClient(issuer.base_url, **issuer.client) as client: ...`.

    Each method returns the token response (RFC 6749, 5.1) unchanged. Its `access_token` is a JWT (RFC 9068) if the
    request named a `resource` (RFC 8707) that the provider knows, otherwise an opaque string.
    """

    def __init__(self, base_url: str, *, client_id: str, client_secret: str, redirect_uri: str) -> None:
        self._id = client_id
        self._redirect_uri = redirect_uri
        self._client = httpx.AsyncClient(
            base_url=base_url, auth=(client_id, client_secret), cookies=no_cookies(), trust_env=False, timeout=30
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def authorization_code(self, session: Session, *, scope: str, resource: str | None = None) -> dict[str, Any]:
        """Get the tokens that a signed-in user grants (RFC 6749, 4.1, with PKCE), without a consent page.

        scope: space-separated; `openid` adds an ID token, `offline_access` a refresh token. Raises Refused.
        """
        verifier, state = secrets.token_urlsafe(48), secrets.token_urlsafe()
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        parameters = {
            "response_type": "code",
            "client_id": self._id,
            "redirect_uri": self._redirect_uri,
            "scope": scope,
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        } | _resource_parameter(resource)
        response = await self._client.get("/oauth2/authorize", params=parameters, headers=session.cookie)
        redirect = parse_qs(urlsplit(response.headers.get("location", "")).query)
        if "code" not in redirect or redirect.get("state") != [state]:
            code = redirect.get("error", ["no_code"])[0]
            message = redirect.get("error_description", ["no code in the redirect"])[0]
            raise Refused(response.status_code, code, message)
        return await self._token(
            resource,
            grant_type="authorization_code",
            code=redirect["code"][0],
            redirect_uri=self._redirect_uri,
            code_verifier=verifier,
        )

    async def refresh(self, refresh_token: str, *, resource: str | None = None) -> dict[str, Any]:
        """Exchange a refresh token for new tokens (RFC 6749, 6). Raises Refused."""
        return await self._token(resource, grant_type="refresh_token", refresh_token=refresh_token)

    async def client_credentials(self, *, scope: str, resource: str | None = None) -> dict[str, Any]:
        """Get a token for the client itself, without a user (RFC 6749, 4.4). Raises Refused."""
        return await self._token(resource, grant_type="client_credentials", scope=scope)

    async def _token(self, resource: str | None, **form: str) -> dict[str, Any]:
        response = await self._client.post("/oauth2/token", data=form | _resource_parameter(resource))
        body: dict[str, Any] = response.json()
        if response.is_error:
            raise Refused(response.status_code, body.get("error", "-"), body.get("error_description", ""))
        return body


def _resource_parameter(resource: str | None) -> dict[str, str]:
    return {"resource": resource} if resource else {}
