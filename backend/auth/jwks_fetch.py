"""Fetches a key set once, with limits on time, size, redirects and compression."""

import asyncio
import re
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from types import MappingProxyType
from typing import Final, NamedTuple

import httpx

MAX_BODY: Final = 256 * 1024
MAX_CHUNKS: Final = 1024
CONNECT_TIMEOUT: Final = 1.0
TOTAL_TIMEOUT: Final = 5.0
MAX_RETRY_AFTER: Final = 60.0

_HEADERS: Final = MappingProxyType(
    {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
)
_MAX_AGE: Final = re.compile(r'(?:^|,)\s*max-age\s*=\s*"?(\d{1,9})', re.IGNORECASE)


class Fetched(NamedTuple):
    """The body of a 200 response and its `Cache-Control: max-age` in seconds."""

    body: bytes
    max_age: float | None


class FetchFailed(Exception):
    """The fetch failed. The message is safe to log; `retry_after` is in seconds, 0 without such a header."""

    def __init__(self, text: str, retry_after: float = 0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


def check_url(url: str) -> httpx.URL:
    """Parse an https URL, or http to a loopback address. Raises ValueError: over http, keys could be replaced."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"not a URL: {error}") from None
    if parsed.userinfo or parsed.fragment:
        raise ValueError("the JWKS URL must not contain credentials or a fragment")
    if not parsed.host or (parsed.scheme != "https" and not (parsed.scheme == "http" and _is_loopback(parsed.host))):
        raise ValueError("the JWKS URL must use https (http only to a loopback address)")
    return parsed


def new_client() -> httpx.AsyncClient:
    """Create a client without proxies or credentials from the environment, keep-alive connections or cookies."""
    return httpx.AsyncClient(
        trust_env=False,
        limits=httpx.Limits(max_connections=2, max_keepalive_connections=0),
        # Cookies would accumulate until the endpoint rejects the request.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    )


async def fetch(client: httpx.AsyncClient, url: httpx.URL, clock: Callable[[], float]) -> Fetched:
    """GET `url` in at most 5 s and 256 KiB, without redirects or decompression. Raises FetchFailed."""
    timeout = httpx.Timeout(TOTAL_TIMEOUT, connect=CONNECT_TIMEOUT)
    try:
        async with (
            asyncio.timeout(TOTAL_TIMEOUT),
            client.stream("GET", url, headers=_HEADERS, follow_redirects=False, timeout=timeout) as response,
        ):
            if response.status_code != HTTPStatus.OK:
                raise FetchFailed(f"HTTP {response.status_code}", _retry_after(response.headers, clock))
            codings = {coding.strip().lower() for coding in response.headers.get("content-encoding", "").split(",")}
            if not codings <= {"", "identity"}:
                raise FetchFailed("the body is compressed although identity was requested")
            return Fetched(await _read(response), _max_age(response.headers))
    except TimeoutError:
        raise FetchFailed(f"no complete response within {TOTAL_TIMEOUT:g} s") from None
    except httpx.ConnectError as error:
        # The message of the operating system or of TLS names the cause: refused, unknown host, bad certificate.
        raise FetchFailed(f"cannot connect: {_printable(str(error))}") from None
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise FetchFailed(type(error).__name__) from None


async def _read(response: httpx.Response) -> bytes:
    # aread() would read the whole body before its length could be checked.
    body, chunks = bytearray(), 0
    async for chunk in response.aiter_bytes():
        body += chunk
        chunks += 1
        if len(body) > MAX_BODY:
            raise FetchFailed(f"the body is over {MAX_BODY // 1024} KiB")
        if chunks > MAX_CHUNKS:
            raise FetchFailed(f"the body has more than {MAX_CHUNKS} chunks")
        await asyncio.sleep(0)  # chunks that are already buffered would otherwise never yield to the event loop
    return bytes(body)


def _max_age(headers: httpx.Headers) -> float | None:
    found = _MAX_AGE.search(headers.get("cache-control", ""))
    return float(found[1]) if found else None


def _retry_after(headers: httpx.Headers, clock: Callable[[], float]) -> float:
    """Return the longer of Retry-After (RFC 9110, 10.2.3) and Better Auth's X-Retry-After, at most 60 s."""
    waits = [_seconds(headers[name].strip(), clock) for name in ("retry-after", "x-retry-after") if name in headers]
    return min(max([0.0, *waits]), MAX_RETRY_AFTER)


def _seconds(value: str, clock: Callable[[], float]) -> float:
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return date.replace(tzinfo=date.tzinfo or UTC).timestamp() - clock()
    except (ValueError, OverflowError):
        return 0.0


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:200]
