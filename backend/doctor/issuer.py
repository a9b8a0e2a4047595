"""The way to the issuer's keys, from the name in the settings to the last key that cannot be used."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import httpx

from backend.auth import KeySet, UnusableKeys
from backend.auth.encoding import decode_jwks
from backend.auth.fetch import TOTAL_TIMEOUT, FetchFailed, check_url, fetch, new_client
from backend.auth.jwk import read_key
from backend.doctor.findings import Finding, fail, listed, ok, shown, warn
from backend.settings import Settings

LEEWAY: Final = 5  # seconds, as the verifier's
# Where else Better Auth servers have their endpoints, and below these their keys.
_BASES: Final = ("/api/auth", "/auth", "/auth/v1", "")
_KEYS: Final = ("/jwks", "/.well-known/jwks.json", "/jwks.json", "/.well-known/jwks", "/keys")
_MANY: Final = 5

_NEW_KEY: Final = (
    "let the jwt plugin make another (`jwks.keyPairConfig`), and delete this row of Better Auth's table jwks"
)
_FEWER_KEYS: Final = (
    "delete the expired rows of Better Auth's table jwks, and let them go sooner: "
    "a shorter `jwks.gracePeriod` or a longer `jwks.rotationInterval` in its jwt plugin"
)


@dataclass
class Issuer:
    """What is known of Better Auth so far."""

    base_url: str
    """Where its endpoints are for this machine; the public address may be another one."""
    setting: str
    """What says where its keys are."""
    keys: KeySet | None = None
    ahead: float = 0
    """Seconds between its clock and this machine's."""


class Road:
    """Walks to the keys as the API does, and looks around where it does not get there.

    What was learnt is left in `issuer`. `clock` gives seconds since 1970.
    """

    def __init__(self, settings: Settings, issuer: Issuer, *, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._issuer = issuer
        self._clock = clock
        self._url = check_url(settings.jwks_url)
        self._setting = issuer.setting

    async def walk(self) -> AsyncIterator[Finding]:
        async for finding in self._reach():
            yield finding
            if not finding.holds:
                return
        async with new_client() as client:
            head = await _head(client, str(self._url))
            if head is None:
                yield fail("better auth", f"nothing is answered at {self._url}: see its log, or mend {self._setting}")
                return
            clocks = self._compare_clocks(head)
            try:
                body = (await fetch(client, self._url, self._clock)).body
                missed = "a page, not keys," if body.lstrip().startswith(b"<") else ""
            except FetchFailed as error:
                missed = str(error)
            base = await self._find_better_auth(client)
            if base is not None:
                self._issuer.base_url = base
            if missed:
                yield await self._miss(client, head, base, missed)
            else:
                if base == self._expected:
                    yield ok("better auth", f"answers at {base}")
                for finding in self._read(body):
                    yield finding
        for finding in clocks:
            yield finding

    @property
    def _expected(self) -> str:
        """Where Better Auth's endpoints are if the settings are right: on the host from which the keys come."""
        return f"{_origin(str(self._url))}{urlsplit(self._settings.base_url).path}"

    async def _reach(self) -> AsyncIterator[Finding]:
        host, secure = self._url.host, self._url.scheme == "https"
        port = self._url.port or (443 if secure else 80)
        elsewhere = "" if self._settings.better_auth_jwks_url else ", or set BETTER_AUTH_JWKS_URL to an inner address"
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            yield fail("dns", f"{host} is not known here ({_why(error)}): mend {self._setting}{elsewhere}")
            return
        yield ok("dns", f"{host} is {listed(sorted({entry[4][0] for entry in found}))}")
        context = httpx.create_ssl_context(trust_env=False) if secure else None  # what the API trusts, and no more
        try:
            async with asyncio.timeout(TOTAL_TIMEOUT):
                _, writer = await asyncio.open_connection(host, port, ssl=context)
        except ssl.SSLCertVerificationError as error:
            yield fail(
                "tls",
                f"{host}:{port}: {error.verify_message}: its certificate must be a public authority's, for the name "
                f"in {self._setting}{elsewhere}",
            )
        except ssl.SSLError:
            yield fail(
                "tls", f"{host}:{port} does not speak TLS: {self._setting} must say the https address{elsewhere}"
            )
        except (OSError, TimeoutError) as error:
            yield fail(
                "tcp",
                f"nobody answers at {host}:{port} ({_why(error)}): start Better Auth, or mend "
                f"{self._setting}{elsewhere}",
            )
        else:
            writer.close()
            yield ok("tls" if secure else "tcp", f"{host}:{port} takes connections")

    async def _find_better_auth(self, client: httpx.AsyncClient) -> str | None:
        """The first address at which it says that it is there; the expected one is asked first."""
        origin = _origin(str(self._url))
        path = urlsplit(self._settings.base_url).path
        parts = urlsplit(str(self._url)).path.split("/")
        # Someone may have copied any address of the server, so each part of its path is tried, too.
        above = ["/".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
        for candidate in dict.fromkeys([path, *above, *(f"{part}/api/auth" for part in above), *_BASES]):
            if await _is_better_auth(client, f"{origin}{candidate}", self._clock):
                return f"{origin}{candidate}"
        return None

    async def _miss(self, client: httpx.AsyncClient, head: httpx.Response, base: str | None, why: str) -> Finding:
        """What to change when no keys came."""
        subject, url = "key set", str(self._url)
        if head.has_redirect_location:
            target = urljoin(url, head.headers["location"])
            where = f"{url} redirects to {shown(target)}, which is not followed"
            if urlsplit(target).path != self._url.path:
                return fail(
                    subject,
                    f"{where}: let its path pass by whatever asks for a sign-in there, such as the app's middleware; "
                    f"or mend {self._setting}",
                )
            wanted = target if self._setting == "BETTER_AUTH_JWKS_URL" else _short(target.removesuffix("/jwks"))
            return fail(subject, f"{where}: set {self._setting} to {shown(wanted)}")
        if head.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return fail(
                subject, f"{why} at {url}: exempt this path from Better Auth's `rateLimit`, or call from fewer places"
            )
        if head.is_server_error:
            return fail(subject, f"{why} at {url}: Better Auth's own log says what ails it")
        if head.is_success and why.startswith("the body is over"):
            return fail(subject, f"{why} at {url}: {_FEWER_KEYS}")
        if base is None:
            return fail(
                subject,
                f"{why} at {url}, and no Better Auth on {_origin(url)}: set BETTER_AUTH_URL to its `baseURL`, with the "
                "path where its handler is mounted unless that is /api/auth",
            )
        if base != self._expected and self._setting == "BETTER_AUTH_URL":
            return fail(subject, f"{why} at {url}: Better Auth is at {base}: set BETTER_AUTH_URL to {_short(base)}")
        for path in _KEYS:
            if f"{base}{path}" != url and await _has_keys(client, f"{base}{path}", self._clock):
                return fail(subject, f"{why} at {url}: set BETTER_AUTH_JWKS_URL to {base}{path}, where the keys are")
        return fail(
            subject,
            f"{why} at {url}, though Better Auth is at {base}: give it the jwt plugin; if it has a `jwksPath`, set "
            "BETTER_AUTH_JWKS_URL to that address",
        )

    def _read(self, body: bytes) -> Iterator[Finding]:
        subject = "keys"
        try:
            document: Any = decode_jwks(body)
        except ValueError:
            yield fail(
                "key set", f"not JSON at {self._url}: set {self._setting} so that it leads to Better Auth's keys"
            )
            return
        try:
            keys = KeySet.from_jwks(document)
        except UnusableKeys as error:
            entries = document.get("keys")
            if not isinstance(entries, list):
                remedy = f"set {self._setting} so that it leads to Better Auth's keys"
                yield fail("key set", f"{error} at {self._url}: {remedy}")
            elif not entries:
                yield fail(
                    subject, "the set is empty: Better Auth makes a key when it signs first: ask its /token once"
                )
            elif str(error).startswith("more than"):
                yield fail(subject, f"{error}, so none is read: {_FEWER_KEYS}")
            else:
                for entry in entries:
                    kid = entry.get("kid") if isinstance(entry, dict) else None
                    reason = _unsound(entry) or "several keys share this kid"
                    yield fail(subject, f"{_name(kid)} cannot be used: {reason}: {_NEW_KEY}")
            return
        self._issuer.keys = keys
        named = [f"{shown(key.kid)} ({key.algorithm})" for key in keys.keys.values()]
        more = f" and {len(named) - _MANY} more" if len(named) > _MANY else ""
        yield ok(subject, f"{len(named)} can be used: {', '.join(named[-_MANY:])}{more}")
        for skipped in keys.skipped:
            yield warn(subject, f"{_name(skipped.kid)} cannot be used: {skipped.reason}: {_NEW_KEY}")

    def _compare_clocks(self, head: httpx.Response) -> list[Finding]:
        try:
            # Of a second only its beginning is told.
            there = parsedate_to_datetime(head.headers["date"]).timestamp() + 0.5
        except (KeyError, ValueError):
            return []
        self._issuer.ahead = ahead = there - self._clock()
        if ahead > LEEWAY:
            said = f"{ahead:.0f} s ahead of this machine's, so that its tokens are not valid here yet: set both by NTP"
            return [fail("clock", f"Better Auth's is {said}")]
        if ahead < -LEEWAY:
            said = f"{-ahead:.0f} s behind this machine's, so that its tokens expire sooner: set both by NTP"
            return [warn("clock", f"Better Auth's is {said}")]
        return [ok("clock", "Better Auth's and this machine's agree")]


async def _head(client: httpx.AsyncClient, url: str) -> httpx.Response | None:
    """The head of an answer, whatever follows it; None when there is none."""
    try:
        async with asyncio.timeout(TOTAL_TIMEOUT), client.stream("GET", url, follow_redirects=False) as response:
            return response
    except (httpx.HTTPError, OSError, TimeoutError):
        return None


async def _is_better_auth(client: httpx.AsyncClient, base: str, clock: Callable[[], float]) -> bool:
    try:
        return bool(json.loads((await fetch(client, httpx.URL(f"{base}/ok"), clock)).body) == {"ok": True})
    except (FetchFailed, ValueError):
        return False


async def _has_keys(client: httpx.AsyncClient, url: str, clock: Callable[[], float]) -> bool:
    try:
        KeySet.from_jwks(decode_jwks((await fetch(client, httpx.URL(url), clock)).body))
    except (FetchFailed, UnusableKeys, ValueError):
        return False
    return True


def _unsound(entry: object) -> str:
    try:
        read_key(entry)
    except UnusableKeys as error:
        return str(error)
    return ""


def _name(kid: object) -> str:
    return "a key without a kid" if kid is None else f"kid {shown(kid)}"


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _short(base: str) -> str:
    """As BETTER_AUTH_URL wants it: the origin alone where the endpoints are under /api/auth."""
    origin = _origin(base)
    return origin if base == f"{origin}/api/auth" else base


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return shown(error.strerror or type(error).__name__) if isinstance(error, OSError) else "not a host name"
