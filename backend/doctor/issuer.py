"""Examines the path to the issuer's keys: DNS, TCP, TLS, Better Auth's address, the JWKS, each key, the clock."""

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
from backend.auth.jwk import read_key
from backend.auth.jwks_fetch import TOTAL_TIMEOUT, FetchFailed, check_url, fetch, new_client
from backend.doctor.findings import Finding, fail, listed, ok, shown, warn
from backend.settings import Settings

LEEWAY: Final = 5  # seconds, as the verifier's
# Common addresses of Better Auth's endpoints, and of the keys below them.
_BASES: Final = ("/api/auth", "/auth", "/auth/v1", "")
_KEYS: Final = ("/jwks", "/.well-known/jwks.json", "/jwks.json", "/.well-known/jwks", "/keys")
_MANY: Final = 5

_NEW_KEY: Final = (
    "let the jwt plugin generate another (`jwks.keyPairConfig`), and delete this row of Better Auth's table jwks"
)
_FEWER_KEYS: Final = (
    "delete the expired rows of Better Auth's table jwks, and let keys expire sooner: "
    "a shorter `jwks.gracePeriod` or a longer `jwks.rotationInterval` in its jwt plugin"
)


@dataclass
class Issuer:
    """What the examination has found out about Better Auth."""

    base_url: str
    """The address of its endpoints from this machine; its public address may differ."""
    setting: str
    """The name of the setting that determines the address of its keys."""
    keys: KeySet | None = None
    ahead: float = 0
    """How far its clock is ahead of this machine's, in seconds."""


class IssuerExamination:
    """Fetches the keys as the API does, and tries other addresses if that fails.

    Stores the results in `issuer`. `clock` returns seconds since 1970.
    """

    def __init__(self, settings: Settings, issuer: Issuer, *, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._issuer = issuer
        self._clock = clock
        self._url = check_url(settings.jwks_url)
        self._setting = issuer.setting

    async def findings(self) -> AsyncIterator[Finding]:
        async for finding in self._reach():
            yield finding
            if not finding.holds:
                return
        async with new_client() as client:
            head = await _head(client, str(self._url))
            if head is None:
                yield fail("better auth", f"no response from {self._url}: see its log, or correct {self._setting}")
                return
            clocks = self._compare_clocks(head)
            try:
                body = (await fetch(client, self._url, self._clock)).body
                problem = "an HTML page instead of keys" if body.lstrip().startswith(b"<") else ""
            except FetchFailed as error:
                problem = str(error)
            base = await self._find_better_auth(client)
            if base is not None:
                self._issuer.base_url = base
            if problem:
                yield await self._explain(client, head, base, problem)
            else:
                if base == self._expected:
                    yield ok("better auth", f"responds at {base}")
                for finding in self._read(body):
                    yield finding
        for finding in clocks:
            yield finding

    @property
    def _expected(self) -> str:
        """The address of Better Auth's endpoints if the settings are correct: on the same host as the keys."""
        return f"{_origin(str(self._url))}{urlsplit(self._settings.base_url).path}"

    async def _reach(self) -> AsyncIterator[Finding]:
        host, secure = self._url.host, self._url.scheme == "https"
        port = self._url.port or (443 if secure else 80)
        internal = "" if self._settings.better_auth_jwks_url else ", or set BETTER_AUTH_JWKS_URL to an internal address"
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            yield fail("dns", f"{host} cannot be resolved ({_why(error)}): correct {self._setting}{internal}")
            return
        yield ok("dns", f"{host} resolves to {listed(sorted({entry[4][0] for entry in found}))}")
        context = httpx.create_ssl_context(trust_env=False) if secure else None  # the authorities that the API trusts
        try:
            async with asyncio.timeout(TOTAL_TIMEOUT):
                _, writer = await asyncio.open_connection(host, port, ssl=context)
        except ssl.SSLCertVerificationError as error:
            needed = f"it needs a public authority's certificate for the name in {self._setting}"
            yield fail("tls", f"{host}:{port}: {error.verify_message}: {needed}{internal}")
        except ssl.SSLError:
            yield fail("tls", f"{host}:{port} does not speak TLS: set {self._setting} to the https address{internal}")
        except (OSError, TimeoutError) as error:
            remedy = f"start Better Auth, or correct {self._setting}{internal}"
            yield fail("tcp", f"no connection to {host}:{port} ({_why(error)}): {remedy}")
        else:
            writer.close()
            yield ok("tls" if secure else "tcp", f"{host}:{port} accepts connections")

    async def _find_better_auth(self, client: httpx.AsyncClient) -> str | None:
        """The first address at which Better Auth responds, beginning with the expected one; None if there is none."""
        origin = _origin(str(self._url))
        path = urlsplit(self._settings.base_url).path
        parts = urlsplit(str(self._url)).path.split("/")
        # The setting may hold any address copied from the server, so each prefix of its path is tried, too.
        above = ["/".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
        for candidate in dict.fromkeys([path, *above, *(f"{part}/api/auth" for part in above), *_BASES]):
            if await _is_better_auth(client, f"{origin}{candidate}", self._clock):
                return f"{origin}{candidate}"
        return None

    async def _explain(self, client: httpx.AsyncClient, head: httpx.Response, base: str | None, why: str) -> Finding:
        """The remedy if the keys could not be fetched."""
        subject, url = "key set", str(self._url)
        if head.has_redirect_location:
            target = urljoin(url, head.headers["location"])
            where = f"{url} redirects to {shown(target)}, which is not followed"
            if urlsplit(target).path != self._url.path:
                remedy = f"exempt this path from the app's sign-in check, or correct {self._setting}"
                return fail(subject, f"{where}: {remedy}")
            wanted = target if self._setting == "BETTER_AUTH_JWKS_URL" else _short(target.removesuffix("/jwks"))
            return fail(subject, f"{where}: set {self._setting} to {shown(wanted)}")
        if head.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return fail(subject, f"{why} at {url}: exempt this path from Better Auth's `rateLimit`")
        if head.is_server_error:
            return fail(subject, f"{why} at {url}: see Better Auth's log")
        if head.is_success and why.startswith("the body is over"):
            return fail(subject, f"{why} at {url}: {_FEWER_KEYS}")
        if base is None:
            remedy = "set BETTER_AUTH_URL to its `baseURL`, with its handler's path unless that is /api/auth"
            return fail(subject, f"{why} at {url}, and no Better Auth on {_origin(url)}: {remedy}")
        if base != self._expected and self._setting == "BETTER_AUTH_URL":
            return fail(subject, f"{why} at {url}: Better Auth is at {base}: set BETTER_AUTH_URL to {_short(base)}")
        for path in _KEYS:
            if f"{base}{path}" != url and await _has_keys(client, f"{base}{path}", self._clock):
                return fail(subject, f"{why} at {url}: the keys are at {base}{path}: set BETTER_AUTH_JWKS_URL to it")
        remedy = "add the jwt plugin to it, or set BETTER_AUTH_JWKS_URL to that plugin's `jwksPath`"
        return fail(subject, f"{why} at {url}, though Better Auth is at {base}: {remedy}")

    def _read(self, body: bytes) -> Iterator[Finding]:
        subject = "keys"
        try:
            document: Any = decode_jwks(body)
        except ValueError:
            yield fail("key set", f"no JSON at {self._url}: correct {self._setting}")
            return
        try:
            keys = KeySet.from_jwks(document)
        except UnusableKeys as error:
            entries = document.get("keys")
            if not isinstance(entries, list):
                yield fail("key set", f"{error} at {self._url}: correct {self._setting}")
            elif not entries:
                yield fail(subject, "the set is empty: request Better Auth's /token once, which creates the first key")
            elif str(error).startswith("more than"):
                yield fail(subject, f"{error}, so all are ignored: {_FEWER_KEYS}")
            else:
                for entry in entries:
                    kid = entry.get("kid") if isinstance(entry, dict) else None
                    reason = _defect(entry) or "several keys share this kid"
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
            # `Date` is truncated to seconds; half a second is the mean error.
            there = parsedate_to_datetime(head.headers["date"]).timestamp() + 0.5
        except (KeyError, ValueError):
            return []
        self._issuer.ahead = ahead = there - self._clock()
        if ahead > LEEWAY:
            effect = "so its tokens are not valid here yet: synchronise both by NTP"
            return [fail("clock", f"Better Auth's is {ahead:.0f} s ahead of this machine's, {effect}")]
        if ahead < -LEEWAY:
            effect = "so its tokens expire too early here: synchronise both by NTP"
            return [warn("clock", f"Better Auth's is {-ahead:.0f} s behind this machine's, {effect}")]
        return [ok("clock", "Better Auth's and this machine's agree")]


async def _head(client: httpx.AsyncClient, url: str) -> httpx.Response | None:
    """Status and headers of the response, even if its body is unusable; None without a response."""
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


def _defect(entry: object) -> str:
    """Why this entry of the JWKS is not usable; empty if it is."""
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
    """The value for BETTER_AUTH_URL: without the path if that is the default, /api/auth."""
    origin = _origin(base)
    return origin if base == f"{origin}/api/auth" else base


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no response"
    return shown(error.strerror or type(error).__name__) if isinstance(error, OSError) else "not a host name"
