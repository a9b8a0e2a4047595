"""One GET of a key set that a hostile or broken endpoint can neither redirect, stall, inflate nor flood."""

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
    """The body of a 200, and what `Cache-Control: max-age` said, in seconds."""

    body: bytes
    max_age: float | None


class FetchFailed(Exception):
    """No body came. The text is fit for a log; `retry_after` is in seconds, 0 when the endpoint asked for no rest."""

    def __init__(self, text: str, retry_after: float = 0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


def check_url(url: str) -> httpx.URL:
    """Accept https, and http to a loopback address. Else ValueError: keys sent in the clear can be replaced."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"not a URL: {error}") from None
    if parsed.userinfo or parsed.fragment:
        raise ValueError("the address of the key set must hold neither credentials nor a fragment")
    if not parsed.host or (parsed.scheme != "https" and not (parsed.scheme == "http" and _is_loopback(parsed.host))):
        raise ValueError("the address of the key set must be https (http only to a loopback address)")
    return parsed


def new_client() -> httpx.AsyncClient:
    """Make a client that takes no proxy or credentials from the environment and keeps no connection to go stale."""
    return httpx.AsyncClient(
        trust_env=False,
        limits=httpx.Limits(max_connections=2, max_keepalive_connections=0),
        # What an endpoint says must not shape the next request: cookies add up until it refuses them.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    )


async def fetch(client: httpx.AsyncClient, url: httpx.URL, clock: Callable[[], float]) -> Fetched:
    """GET `url` within 5 s in all and 256 KiB, without redirects or decompression. Raises FetchFailed."""
    try:
        async with (
            asyncio.timeout(TOTAL_TIMEOUT),
            client.stream(
                "GET",
                url,
                headers=_HEADERS,
                follow_redirects=False,
                timeout=httpx.Timeout(TOTAL_TIMEOUT, connect=CONNECT_TIMEOUT),
            ) as response,
        ):
            if response.status_code != HTTPStatus.OK:
                raise FetchFailed(f"HTTP {response.status_code}", _retry_after(response.headers, clock))
            codings = {coding.strip().lower() for coding in response.headers.get("content-encoding", "").split(",")}
            if not codings <= {"", "identity"}:
                raise FetchFailed("the body is compressed, though it was not asked for")
            return Fetched(await _read(response), _max_age(response.headers))
    except TimeoutError:
        raise FetchFailed(f"no whole answer within {TOTAL_TIMEOUT:g} s") from None
    except httpx.ConnectError as error:
        # The operating system's or TLS's words (refused, unknown host, bad certificate) are what one needs to know.
        raise FetchFailed(f"cannot connect: {_printable(str(error))}") from None
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise FetchFailed(type(error).__name__) from None


async def _read(response: httpx.Response) -> bytes:
    # Not aread(): it would read to the end before anyone could look at the length.
    body = bytearray()
    chunks = 0
    async for chunk in response.aiter_bytes():
        body += chunk
        chunks += 1
        if len(body) > MAX_BODY:
            raise FetchFailed(f"the body is over {MAX_BODY // 1024} KiB")
        if chunks > MAX_CHUNKS:
            raise FetchFailed(f"the body comes in over {MAX_CHUNKS} pieces")
        await asyncio.sleep(0)  # what has arrived already is handed over without ever giving way
    return bytes(body)


def _max_age(headers: httpx.Headers) -> float | None:
    found = _MAX_AGE.search(headers.get("cache-control", ""))
    return float(found[1]) if found else None


def _retry_after(headers: httpx.Headers, clock: Callable[[], float]) -> float:
    """Read Retry-After (RFC 9110, 10.2.3) and Better Auth's X-Retry-After; the longer one counts, up to 60 s."""
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
