"""RemoteKeys refreshes the key set in the background and uses it during outages up to a maximum age."""

import asyncio
import gzip
import json
from collections.abc import Callable

import httpx
import pytest

from backend.auth import (
    AuthError,
    FetchReason,
    InvalidToken,
    KeysUnavailable,
    Reason,
    SkippedKey,
    StaticKeys,
    jwks_cache,
    jwks_client,
    jwks_refresh,
)
from backend.auth.testing import LocalIssuer
from tests.auth.scripted import Endpoint, Time, outcome, remote_keys, settle


def test_constants_have_their_documented_values() -> None:
    assert (jwks_refresh.REFRESH_EVERY, jwks_refresh.JITTER) == (60, 0.1)
    assert (jwks_refresh.MIN_REFRESH, jwks_refresh.MAX_REFRESH) == (30, 300)
    assert (jwks_refresh.FIRST_BACKOFF, jwks_refresh.MAX_BACKOFF) == (1, 30)
    assert (jwks_refresh.BUDGET, jwks_refresh.BUDGET_EVERY) == (2, 5)
    assert (jwks_client.WAIT_TIMEOUT, jwks_client.MAX_WAITERS) == (2, 32)
    assert jwks_cache.RECHECK_AFTER == 5


class TestFreshness:
    @pytest.mark.parametrize(
        ("random", "cache_control", "seconds"),
        [
            (0.0, None, 54),
            (0.5, None, 60),
            (1.0, None, 66),
            (0.5, "public, max-age=120", 120),
            (0.0, "max-age=120", 108),
            (0.5, 'Max-Age="90"', 90),
            (1.0, "max-age=3600", 300),
            (0.0, "max-age=0", 30),
            (0.5, "s-maxage=200", 60),
            (0.5, "no-store", 60),
            (0.5, "max-age=x", 60),
        ],
    )
    async def test_the_set_is_refreshed_in_the_background(
        self, endpoint: Endpoint, time: Time, random: float, cache_control: str | None, seconds: float
    ) -> None:
        if cache_control:
            endpoint.respond = lambda: endpoint.jwks(**{"Cache-Control": cache_control})
        async with remote_keys(endpoint, time, random=lambda: random) as keys:
            kid = endpoint.issuer.key.kid
            for _ in range(100):
                assert await outcome(keys, kid) == "ok"
            await time.advance(seconds - 0.01)
            assert endpoint.count == 1
            await time.advance(0.02)
            assert endpoint.count == 2
            assert keys.status().fetches[FetchReason.REFRESH] == 2

    async def test_a_removed_key_is_refused_within_66_seconds(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time, random=lambda: 1.0) as keys:
            verifier = endpoint.issuer.verifier(keys, monotonic=time.monotonic)
            token = endpoint.issuer.token()
            await verifier.verify(token)
            endpoint.issuer.rotate(keep=False)
            await verifier.verify(token)
            await time.advance(66)
            with pytest.raises(InvalidToken) as refusal:
                await verifier.verify(token)
            assert refusal.value.reason is Reason.UNKNOWN_KEY

    async def test_a_hanging_refresh_does_not_delay_requests(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            await time.advance(61)
            assert endpoint.count == 2
            assert keys.current(endpoint.issuer.key.kid)
            lookup = asyncio.ensure_future(outcome(keys, endpoint.issuer.key.kid))
            await asyncio.sleep(0)
            assert lookup.done(), "a request with a known kid waited"

    async def test_a_request_starts_an_overdue_refresh(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.issuer.rotate(keep=False)
            gone = keys.status().kids[0]
            time.elapsed += 61  # the machine was suspended: no timer has fired
            assert keys.current(gone), "the cached key is used meanwhile"
            await settle()
            assert keys.current(gone) is None
            assert keys.status().fetches[FetchReason.REFRESH] == 2

    async def test_an_unchanged_set_is_not_parsed_again(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            key = keys.current(endpoint.issuer.key.kid)
            await time.advance(61)
            assert endpoint.count == 2
            assert keys.current(endpoint.issuer.key.kid) is key


class TestOutage:
    async def test_tokens_are_accepted_throughout_an_outage_of_59_minutes(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.fails()
            for _ in range(59):
                await time.advance(60)
                assert await outcome(keys, endpoint.issuer.key.kid) == "ok"
            assert keys.ready

    async def test_a_stale_set_is_503_until_a_refresh_succeeds(self, endpoint: Endpoint, time: Time) -> None:
        kid = endpoint.issuer.key.kid
        async with remote_keys(endpoint, time) as keys:
            endpoint.fails()
            await time.advance(3600)
            assert await outcome(keys, kid) == "ok"
            await time.advance(1)
            assert await outcome(keys, kid) == "503"
            assert not keys.ready
            assert not keys.status().ready
            endpoint.recovers()
            await time.advance(31)
            assert await outcome(keys, kid) == "ok"
            assert keys.ready

    async def test_a_stale_set_can_be_refreshed_by_a_request(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.fails()
            await time.advance(3700)
            assert [await outcome(keys, endpoint.issuer.key.kid) for _ in range(4)] == ["503"] * 4
            assert keys.status().fetches[FetchReason.NO_KEYS] <= 2
            endpoint.recovers()
            time.elapsed += 5
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"

    async def test_a_cached_token_is_refused_when_the_set_is_stale(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time, max_stale=100) as keys:
            verifier = endpoint.issuer.verifier(keys, monotonic=time.monotonic)
            token = endpoint.issuer.token()
            endpoint.fails()
            await verifier.verify(token)
            await time.advance(101)
            with pytest.raises(KeysUnavailable):
                await verifier.verify(token)

    @pytest.mark.parametrize(
        ("random", "sleeps"), [(1.0, [1, 2, 4, 8, 16, 30, 30, 30]), (0.5, [0.5, 1, 2, 4, 8, 15, 15]), (0.0, [])]
    )
    async def test_the_background_refresh_backs_off_with_full_jitter(
        self, endpoint: Endpoint, time: Time, random: float, sleeps: list[float]
    ) -> None:
        async with remote_keys(endpoint, time, random=lambda: random):
            endpoint.fails()
            time.sleeps.clear()
            await time.advance(65 if random == 0 else 200)
            assert time.sleeps[: len(sleeps)] == sleeps
            assert endpoint.count > len(sleeps)

    async def test_a_success_resets_the_backoff(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time, random=lambda: 1.0):
            endpoint.fails()
            await time.advance(200)
            endpoint.recovers()
            await time.advance(30)
            endpoint.fails()
            time.sleeps.clear()
            await time.advance(70)
            assert time.sleeps[0] == 1

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"Retry-After": "20"}, 20),
            ({"X-Retry-After": "10"}, 10),
            ({"Retry-After": "5", "X-Retry-After": "15"}, 15),
            ({"Retry-After": "86400"}, 60),
            ({"Retry-After": "Fri, 15 Jan 2027 08:00:30 GMT"}, 30),
            ({"Retry-After": "Fri, 15 Jan 2027 08:00:30 -0000"}, 30),
            ({"Retry-After": "Fri, 15 Jan 2021 08:00:30 GMT"}, 0.5),
            ({"Retry-After": "soon"}, 0.5),
            ({"Retry-After": "Fri, 15 Jan 99999999999999 08:00:30 GMT"}, 0.5),
            ({"Retry-After": "-3"}, 0.5),
            ({}, 0.5),
        ],
    )
    async def test_both_kinds_of_fetch_obey_retry_after(
        self, endpoint: Endpoint, time: Time, headers: dict[str, str], seconds: float
    ) -> None:
        async with remote_keys(endpoint, time) as keys:
            time.wall = 1_800_000_000.0 - 60
            endpoint.respond = lambda: httpx.Response(429, headers=headers)
            await time.advance(60)
            assert (endpoint.count, time.clock()) == (2, 1_800_000_000.0)
            endpoint.recovers()
            if seconds > 1:
                with pytest.raises(KeysUnavailable) as refusal:
                    await keys.get("unknown")
                assert refusal.value.retry_after == seconds
            assert endpoint.count == 2
            await time.advance(seconds - 0.1)
            assert endpoint.count == 2
            await time.advance(0.1)
            assert endpoint.count == 3

    @pytest.mark.parametrize(
        ("response", "error"),
        [
            (httpx.Response(200, content=b"<html>", headers={"Content-Type": "text/html"}), "not JSON"),
            (httpx.Response(200, content=b'{"keys": [{"kty": "OKP"'), "not JSON"),
            (httpx.Response(200, content=b"\xff"), "not JSON"),
            (httpx.Response(200, content=b"[" * 100_000), "not JSON"),
            (httpx.Response(200, content=b"[]"), "not JSON"),
            (httpx.Response(200, content=b"{}"), "not a JWK set"),
            (httpx.Response(200, content=b""), "not JSON"),
            (httpx.Response(200, json={"keys": []}), "no usable key, 0 skipped"),
            (httpx.Response(200, json={"keys": [{}] * 257}), "more than 256 keys"),
            (httpx.Response(200, json={"keys": [{}]}), "no usable key, 1 skipped, the first: no usable kid"),
            (httpx.Response(302, headers={"Location": "https://elsewhere.example/"}), "HTTP 302"),
            (httpx.Response(204), "HTTP 204"),
            (httpx.Response(429), "HTTP 429"),
            (httpx.Response(500), "HTTP 500"),
            (httpx.Response(200, content=b" " * (256 * 1024 + 1)), "the body is over 256 KiB"),
            (
                httpx.Response(200, content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"}),
                "the body is compressed although identity was requested",
            ),
        ],
    )
    async def test_an_invalid_response_keeps_the_cached_set(
        self, endpoint: Endpoint, time: Time, response: httpx.Response, error: str
    ) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.respond = lambda: response
            await time.advance(61)
            status = keys.status()
            assert (status.ready, status.last_error, status.failures) == (True, error, 2)
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"
            endpoint.recovers()
            await time.advance(61)
            assert keys.status().last_error is None

    async def test_one_invalid_key_does_not_affect_the_others(self, endpoint: Endpoint, time: Time) -> None:
        good = json.dumps(endpoint.issuer.key.jwk)
        body = f'{{"keys": [{{"kid": "twice", "kid": "twice"}}, {{"kty": "oct", "kid": "secret", "k": "AA"}}, {good}]}}'
        endpoint.respond = lambda: httpx.Response(200, content=body.encode())
        async with remote_keys(endpoint, time) as keys:
            assert keys.ready
            assert keys.status().skipped == (
                SkippedKey("twice", "not a JWK"),
                SkippedKey("secret", "private or symmetric"),
            )

    async def test_the_refresh_survives_any_exception_of_the_client(self, endpoint: Endpoint, time: Time) -> None:
        def explode() -> httpx.Response:
            raise LookupError("secret-token")

        async with remote_keys(endpoint, time) as keys:
            endpoint.respond = explode
            await time.advance(120)
            assert keys.status().last_error == "LookupError"
            endpoint.recovers()
            await time.advance(61)
            assert keys.status().last_error is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: StaticKeys({"keys": []}),
        lambda: StaticKeys({}),
        lambda: StaticKeys({"keys": "keys"}),
        lambda: StaticKeys([]),  # type: ignore[arg-type]  # hostile on purpose
        lambda: StaticKeys(None),  # type: ignore[arg-type]  # hostile on purpose
        lambda: StaticKeys({"keys": [None, 1, "x", [], {}]}),
    ],
)
def test_static_keys_need_a_usable_key(make: Callable[[], StaticKeys]) -> None:
    with pytest.raises(AuthError):
        make()


async def test_static_keys_refuse_unknown_kids(issuer: LocalIssuer) -> None:
    keys = StaticKeys(issuer.jwks)
    key = await keys.get(issuer.key.kid)
    assert keys.current(issuer.key.kid) is key
    assert keys.current("another") is None
    assert await keys.replacement(key) is None
    with pytest.raises(InvalidToken):
        await keys.get("another")
