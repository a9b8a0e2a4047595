"""Better Auth over HTTP as the people of an app use it: sign up, sign in, sign out, and ask for a JWT."""

from collections.abc import Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import anyio
import httpx

DEMO_EMAIL = "demo@example.com"
DEMO_PASSWORD = "a-password-that-everybody-knows"  # noqa: S105 - good on a loopback address alone, see `demo_token`


class Refused(Exception):
    """The issuer said no."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        """Better Auth's own, such as INVALID_EMAIL_OR_PASSWORD."""


@dataclass(frozen=True, slots=True, repr=False)
class Session:
    """What a signed-in client holds: a browser the cookies, a mobile app the bearer."""

    user_id: str
    bearer: str
    """Better Auth's signed session token. Opaque: the API wants the JWT that it is exchanged for."""
    cookies: Mapping[str, str]

    @property
    def authorization(self) -> dict[str, str]:
        """The header of a client without cookies."""
        return {"Authorization": f"Bearer {self.bearer}"}

    @property
    def cookie(self) -> dict[str, str]:
        """The header of a browser."""
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}


class People:
    """A client for one issuer, by the address that its endpoints are under; it keeps nobody's session itself.

    `async with People(issuer.base_url) as people: jwt = await people.token(await people.sign_up("a@example.com"))`
    """

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._client = httpx.AsyncClient(
            base_url=base_url,
            # Better Auth refuses a cookie that comes without the Origin a browser would send.
            headers={"Origin": f"{parts.scheme}://{parts.netloc}"},
            cookies=no_cookies(),
            trust_env=False,
            timeout=30,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def sign_up(self, email: str, password: str = DEMO_PASSWORD, name: str = "") -> Session:
        """Make an account and sign in; the name is the local part of the address unless given. Raises Refused."""
        name = name or email.partition("@")[0]
        return session_of(await self.request("POST", "/sign-up/email", email=email, password=password, name=name))

    async def sign_in(self, email: str, password: str = DEMO_PASSWORD) -> Session:
        """Sign in. Raises Refused."""
        return session_of(await self.request("POST", "/sign-in/email", email=email, password=password))

    async def sign_in_anonymously(self) -> Session:
        """Begin without an account."""
        return session_of(await self.request("POST", "/sign-in/anonymous"))

    async def sign_out(self, session: Session) -> None:
        """End the session at the issuer. JWTs already made from it live on until they expire."""
        await self.request("POST", "/sign-out", session.cookie)

    async def token(self, session: Session) -> str:
        """A fresh JWT by the bearer, as mobile clients get it. Raises Refused when the session has ended."""
        return await self._token(session.authorization)

    async def token_by_cookie(self, session: Session) -> str:
        """A fresh JWT by the cookies, as browsers get it. Raises Refused when the session has ended."""
        return await self._token(session.cookie)

    async def request(
        self, method: str, path: str, credentials: Mapping[str, str] | None = None, /, **body: Any
    ) -> httpx.Response:
        """Call any endpoint: `request("POST", "/admin/ban-user", admin.authorization, userId=...)`. Raises Refused."""
        response = await self._client.request(
            method, path, headers=credentials or {}, json=body if method == "POST" else None
        )
        if response.is_error:
            # Better Auth answers some refusals, and a failure of its own, with no body under a JSON content type.
            is_json = response.content and response.headers.get("content-type", "").startswith("application/json")
            reason: dict[str, str] = response.json() if is_json else {}
            raise Refused(response.status_code, reason.get("code", "-"), reason.get("message", "no reason given"))
        return response

    async def _token(self, credentials: Mapping[str, str]) -> str:
        token: str = (await self.request("GET", "/token", credentials)).json()["token"]
        return token


def no_cookies() -> CookieJar:
    """A jar that stays empty. Cookies belong to a Session: a kept one would go along with another person's request."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


def session_of(response: httpx.Response) -> Session:
    """The session that a sign-in or a sign-up, of whatever kind, has answered with."""
    pairs = (cookie.split(";", 1)[0].partition("=") for cookie in response.headers.get_list("set-cookie"))
    return Session(
        user_id=response.json()["user"]["id"],
        bearer=response.headers["set-auth-token"],
        cookies={name: value for name, _, value in pairs if value},
    )


def demo_token(base_url: str, email: str = DEMO_EMAIL) -> str:
    """A JWT of a person of the development issuer, who is signed up first if need be.

    base_url: where the issuer's endpoints are, on a loopback address: the password is no secret.
    Raises ValueError for another address, Refused when the email is taken under another password, and
    httpx.TransportError when nobody answers.
    """
    if not _is_loopback(urlsplit(base_url).hostname or ""):
        raise ValueError("demo people exist on a loopback address alone: their password is no secret")

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
