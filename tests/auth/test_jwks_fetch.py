"""Limits of the JWKS fetch on time, size, redirects and compression, over a real socket."""

import time
import tracemalloc

import httpx
import pytest

from backend.auth import RemoteKeys
from backend.auth import jwks_fetch as fetch_module
from backend.auth.jwks_fetch import FetchFailed, check_url, fetch, new_client
from backend.auth.testing import LocalIssuer
from tests.auth.loopback import Script, bombs, crumbles, drips, floods, hangs, hangs_up, says, says_json, serving


async def fetched(url: str) -> fetch_module.Fetched:
    async with new_client() as client:
        return await fetch(client, httpx.URL(url), time.time)


def test_constants_have_their_documented_values() -> None:
    assert fetch_module.MAX_BODY == 256 * 1024
    assert (fetch_module.CONNECT_TIMEOUT, fetch_module.TOTAL_TIMEOUT, fetch_module.MAX_RETRY_AFTER) == (1, 5, 60)


async def test_a_fetch_asks_for_no_compression_and_sends_no_credentials() -> None:
    async with serving(says_json({"keys": []})) as (url, requests):
        assert (await fetched(url)).body == b'{"keys": []}'
        head = requests[0].decode().lower()
        assert "accept-encoding: identity\r\n" in head
        assert "cookie" not in head
        assert "authorization" not in head


async def test_cookies_are_not_sent_back() -> None:
    """Cookies would accumulate until the endpoint rejects them, and tie the client to one of several servers."""
    async with serving(says("200 OK", b"{}", {"Set-Cookie": "a=b"})) as (url, requests), new_client() as client:
        for _ in range(2):
            await fetch(client, httpx.URL(url), time.time)
    assert [b"cookie" in request.lower() for request in requests] == [False, False]


async def test_an_empty_content_encoding_is_identity() -> None:
    for coding in "", "identity,", "Identity":
        async with serving(says("200 OK", b"{}", {"Content-Encoding": coding})) as (url, _):
            assert (await fetched(url)).body == b"{}"


async def test_a_body_in_a_hundred_thousand_chunks_is_refused() -> None:
    async with serving(crumbles) as (url, _):
        with pytest.raises(FetchFailed, match="more than 1024 chunks"):
            await fetched(url)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (hangs, "no complete response within 0.2 s"),
        (drips, "no complete response within 0.2 s"),
        (floods, "the body is over 256 KiB"),
        (bombs, "the body is compressed although identity was requested"),
        (hangs_up, "RemoteProtocolError"),
        (says("302 Found", headers={"Location": "http://169.254.169.254/"}), "HTTP 302"),
        (says("200 OK", b"{}", {"Content-Encoding": "br"}), "the body is compressed although identity was requested"),
        (says("not HTTP"), "RemoteProtocolError"),
    ],
    ids=["hangs", "slow body", "50 MB", "gzip bomb", "closed early", "redirect", "brotli", "not HTTP"],
)
async def test_a_misbehaving_endpoint_fails_the_fetch_in_bounded_memory(
    script: Script, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script in (hangs, drips):
        monkeypatch.setattr(fetch_module, "TOTAL_TIMEOUT", 0.2)
    async with serving(script) as (url, requests):
        tracemalloc.start()
        try:
            with pytest.raises(FetchFailed) as failure:
                await fetched(url)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert str(failure.value) == error
        assert len(requests) == 1, "a redirect was followed or the request repeated"
        assert peak < 10_000_000, "the body was decompressed or buffered"


def test_a_date_without_a_zone_is_utc_in_any_local_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 5322, 3.3: -0000 means an unknown local zone; HTTP dates are always GMT."""
    headers = httpx.Headers({"Retry-After": "Fri, 15 Jan 2027 08:00:30 -0000"})
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert fetch_module._retry_after(headers, lambda: 1_800_000_000.0) == 30
    finally:
        monkeypatch.undo()
        time.tzset()


async def test_a_refused_connection_fails_the_fetch() -> None:
    async with serving(hangs) as (url, _):
        pass
    with pytest.raises(FetchFailed, match="cannot connect"):
        await fetched(url)


async def test_redirects_are_not_followed_by_a_client_that_follows_them(issuer: LocalIssuer) -> None:
    async with (
        serving(says_json(issuer.jwks)) as (elsewhere, requests),
        serving(says("302 Found", headers={"Location": elsewhere})) as (url, _),
    ):
        async with httpx.AsyncClient(follow_redirects=True) as client:
            with pytest.raises(FetchFailed, match="HTTP 302"):
                await fetch(client, httpx.URL(url), time.time)
        assert not requests


async def test_proxies_of_the_environment_are_not_used(issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    async with serving(says_json(issuer.jwks)) as (url, requests), RemoteKeys(url) as keys:
        assert (await keys.get(issuer.key.kid)).kid == issuer.key.kid
        assert len(requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        "https://auth.example.com/api/auth/jwks",
        "https://10.0.0.1/jwks",
        "http://localhost:3000/jwks",
        "http://LOCALHOST/jwks",
        "http://127.0.0.1/jwks",
        "http://127.9.9.9:1/jwks",
        "http://[::1]:3000/jwks",
    ],
)
def test_https_and_loopback_urls_are_accepted(url: str) -> None:
    assert check_url(url) == httpx.URL(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://auth.example.com/jwks",
        "http://10.0.0.1/jwks",
        "http://localhost.example.com/jwks",
        "http://127.0.0.1.example.com/jwks",
        "http://[::2]/jwks",
        "ftp://localhost/jwks",
        "file:///etc/passwd",
        "data:application/json,{}",
        "//auth.example.com/jwks",
        "/jwks",
        "",
        "https://",
        "https://user:password@auth.example.com/jwks",
        "https://auth.example.com/jwks#fragment",
        "https://auth.example.com:port/jwks",
        "https://auth.example.com/\x00",
    ],
)
def test_unencrypted_and_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        RemoteKeys(url)
