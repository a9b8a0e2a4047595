"""A client for Better Auth's endpoints: sign up, sign in, sign out, get a JWT."""

from collections.abc import Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from typing import Any, Self
from urllib.parse import urlsplit

import anyio
import httpx

DEMO_EMAIL = "demo@example.com"
DEMO_PASSWORD = "a-password-that-everybody-knows"  # noqa: S105 - used on loopback addresses only, see `demo_token`


class Refused(Exception):
    """The issuer responded with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        """Better Auth's error code, such as INVALID_EMAIL_OR_PASSWORD."""


@dataclass(frozen=True, slots=True, repr=False)
class Session:
    """A signed-in client's credentials: cookies in a browser, a bearer token in a mobile app."""

    user_id: str
    bearer: str
    """Better Auth's signed session token. It is opaque; the API accepts only the JWT that it is exchanged for."""
    cookies: Mapping[str, str]

    @property
    def authorization(self) -> dict[str, str]:
        """The request header of a client without cookies."""
        return {"Authorization": f"Bearer {self.bearer}"}

    @property
    def cookie(self) -> dict[str, str]:
        """The request header of a browser."""
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}


class People:
    """A client for the issuer whose endpoints are under `base_url`; it stores no session.

    `async with People(issuer.base_url) as people: jwt = await people.token(await people.sign_up("a@example.com"))`
    """

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._client = httpx.AsyncClient(
            base_url=base_url,
            # Better Auth rejects cookies without the Origin header that a browser sends.
            headers={"Origin": f"{parts.scheme}://{parts.netloc}"},
            cookies=no_cookies(),
            trust_env=False,
            timeout=30,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def sign_up(self, email: str, password: str = DEMO_PASSWORD, name: str = "") -> Session:
        """Create an account and sign in; `name` defaults to the local part of the address. Raises Refused."""
        name = name or email.partition("@")[0]
        return session_of(await self.request("POST", "/sign-up/email", email=email, password=password, name=name))

    async def sign_in(self, email: str, password: str = DEMO_PASSWORD) -> Session:
        """Sign in. Raises Refused."""
        return session_of(await self.request("POST", "/sign-in/email", email=email, password=password))

    async def sign_in_anonymously(self) -> Session:
        """Start a session without an account (the anonymous plugin)."""
        return session_of(await self.request("POST", "/sign-in/anonymous"))

    async def sign_out(self, session: Session) -> None:
        """End the session at the issuer. JWTs that were issued for it stay valid until they expire."""
        await self.request("POST", "/sign-out", session.cookie)

    async def token(self, session: Session) -> str:
        """Get a new JWT with the bearer token, as mobile clients do. Raises Refused if the session has ended."""
        return await self._token(session.authorization)

    async def token_by_cookie(self, session: Session) -> str:
        """Get a new JWT with the cookies, as browsers do. Raises Refused if the session has ended."""
        return await self._token(session.cookie)

    async def request(
        self, method: str, path: str, credentials: Mapping[str, str] | None = None, /, **body: Any
    ) -> httpx.Response:
        """Call any endpoint: `request("POST", "/admin/ban-user", admin.authorization, userId=...)`. Raises Refused."""
        response = await self._client.request(
            method, path, headers=credentials or {}, json=body if method == "POST" else None
        )
        if response.is_error:
            # Some of Better Auth's error responses have a JSON content type and an empty body.
            is_json = response.content and response.headers.get("content-type", "").startswith("application/json")
            reason: dict[str, str] = response.json() if is_json else {}
            raise Refused(response.status_code, reason.get("code", "-"), reason.get("message", "no message"))
        return response

    async def _token(self, credentials: Mapping[str, str]) -> str:
        token: str = (await self.request("GET", "/token", credentials)).json()["token"]
        return token


def no_cookies() -> CookieJar:
    """A cookie jar that stays empty: a stored cookie would be sent with another user's requests."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


def session_of(response: httpx.Response) -> Session:
    """Read the session from the response to a sign-in or sign-up of any kind."""
    pairs = (cookie.split(";", 1)[0].partition("=") for cookie in response.headers.get_list("set-cookie"))
    return Session(
        user_id=response.json()["user"]["id"],
        bearer=response.headers["set-auth-token"],
        cookies={name: value for name, _, value in pairs if value},
    )


def demo_token(base_url: str, email: str = DEMO_EMAIL) -> str:
    """Get a JWT for a demo user of the development issuer; creates the user at the first call.

    base_url: the address of the issuer's endpoints; loopback only, because the password is public.
    Raises ValueError for another address, Refused if the account has another password, and httpx.TransportError if
    the issuer does not respond.
    """
    if not _is_loopback(urlsplit(base_url).hostname or ""):
        raise ValueError("demo users exist only on a loopback address, because their password is public")

    async def get() -> str:
        async with People(base_url) as people:
            try:
                session = await people.sign_in(email)
            except Refused as refused:
                if refused.code != "INVALID_EMAIL_OR_PASSWORD":
                    raise
                session = await people.sign_up(email)
            return await people.token(session)

    return anyio.run(get)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
