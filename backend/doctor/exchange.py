"""Exchanges a session token for a JWT at Better Auth's `/token`."""

import httpx

from backend.auth.jwks_fetch import TOTAL_TIMEOUT, check_url, new_client
from backend.doctor.findings import Finding, fail, ok, warn


async def exchange(session_token: str, base_url: str, resource: str) -> tuple[str, Finding]:
    """Return the JWT, empty if there is none, and the finding on the exchange.

    base_url: the address of Better Auth's endpoints.
    resource: this API's identifier, for the advice on opaque access tokens.
    """
    subject, url = "exchange", f"{base_url}/token"
    try:
        check_url(url)
    except ValueError:
        return "", warn(subject, f"not sent to {url}, which is neither https nor a loopback address")
    try:
        async with new_client() as client:
            response = await client.get(
                url,
                headers={"Authorization": f"Bearer {session_token}"},
                follow_redirects=False,
                timeout=TOTAL_TIMEOUT,
            )
        jwt = str(response.json()["token"]) if response.is_success else ""
    except httpx.HTTPError as error:
        return "", fail(subject, f"the request to {url} failed ({type(error).__name__}): see above")
    except (ValueError, KeyError, TypeError):
        return "", fail(subject, f"the response of {url} has no token: set BETTER_AUTH_URL to Better Auth's `baseURL`")
    if not response.is_success:
        return "", fail(subject, f"HTTP {response.status_code} at {url}: {_reason(response, resource)}")
    return jwt, ok(subject, "Better Auth issued a JWT for this session; the lines below are about that JWT")


def _reason(response: httpx.Response, resource: str) -> str:
    if response.is_server_error and not response.content:
        return (
            "Better Auth cannot decrypt its signing key, as after a change of BETTER_AUTH_SECRET: "
            "restore the old secret, or delete the rows of its table jwks"
        )
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return (
            "the session has ended; or the account is banned; or Better Auth lacks the bearer plugin, whose "
            "`requireSignature` accepts only the value of the response header set-auth-token; or this is an opaque "
            f"access token: request one with resource={resource}"
        )
    if response.status_code == httpx.codes.NOT_FOUND:
        return "add the jwt plugin to Better Auth"
    return "see Better Auth's log"
