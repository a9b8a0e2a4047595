"""RemoteKeys keeps each promise about freshness, floods, outages and cost, over hours that pass at once."""

import asyncio
import gzip
import json
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import httpx
import pytest

from backend.auth import (
    AuthError,
    FetchReason,
    InvalidToken,
    KeysUnavailable,
    Observer,
    Reason,
    RemoteKeys,
    SkippedKey,
    StaticKeys,
    key_cache,
    refresh,
)
from backend.auth import remote_keys as remote_keys_module
from backend.auth.testing import LocalIssuer, SigningKey
from tests.auth.scripted import Endpoint, Time, remote_keys, settle


async def outcome(keys: RemoteKeys, kid: str) -> str:
    """What becomes of a request that names a kid: `ok`, 401 or 503."""
    try:
        await keys.get(kid)
    except InvalidToken:
        return "401"
    except KeysUnavailable:
        return "503"
    return "ok"


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests give up waiting at once rather than after two real seconds."""
    monkeypatch.setattr(remote_keys_module, "WAIT_TIMEOUT", 0.01)


def test_the_figures() -> None:
    assert (refresh.REFRESH_EVERY, refresh.JITTER) == (60, 0.1)
    assert (refresh.MIN_REFRESH, refresh.MAX_REFRESH) == (30, 300)
    assert (refresh.FIRST_BACKOFF, refresh.MAX_BACKOFF) == (1, 30)
    assert (refresh.BUDGET, refresh.BUDGET_EVERY) == (2, 5)
    assert (remote_keys_module.WAIT_TIMEOUT, remote_keys_module.MAX_WAITERS) == (2, 32)
    assert key_cache.RECHECK_AFTER == 5


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
    async def test_refreshes_in_the_background(
        self, endpoint: Endpoint, time: Time, random: float, cache_control: str | None, seconds: float
    ) -> None:
        if cache_control:
            endpoint.answer = lambda: endpoint.jwks(**{"Cache-Control": cache_control})
        async with remote_keys(endpoint, time, random=lambda: random) as keys:
            kid = endpoint.issuer.key.kid
            for _ in range(100):
                assert await outcome(keys, kid) == "ok"
            await time.advance(seconds - 0.01)
            assert endpoint.count == 1
            await time.advance(0.02)
            assert endpoint.count == 2
            assert keys.status().fetches[FetchReason.REFRESH] == 2

    async def test_a_removed_key_is_gone_within_66_seconds(self, endpoint: Endpoint, time: Time) -> None:
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

    async def test_a_refresh_that_hangs_delays_nobody(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            await time.advance(61)
            assert endpoint.count == 2
            assert keys.current(endpoint.issuer.key.kid)
            getting = asyncio.ensure_future(outcome(keys, endpoint.issuer.key.kid))
            await asyncio.sleep(0)
            assert getting.done(), "a request with a known kid waited"

    async def test_requests_wake_a_refresh_that_overslept(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.issuer.rotate(keep=False)
            gone = keys.status().kids[0]
            time.elapsed += 61  # the machine was suspended: no timer has fired
            assert keys.current(gone), "it is served meanwhile"
            await settle()
            assert keys.current(gone) is None
            assert keys.status().fetches[FetchReason.REFRESH] == 2

    async def test_an_unchanged_set_is_not_read_again(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            key = keys.current(endpoint.issuer.key.kid)
            await time.advance(61)
            assert endpoint.count == 2
            assert keys.current(endpoint.issuer.key.kid) is key


class TestUnknownKid:
    async def test_a_rotation_costs_one_fetch(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            new = endpoint.issuer.rotate()
            assert Counter(await asyncio.gather(*(outcome(keys, new.kid) for _ in range(20)))) == {"ok": 20}
            assert endpoint.count == 2
            assert keys.status().fetches[FetchReason.UNKNOWN_KID] == 1
            assert keys.status().unknown_kids == 20

    async def test_a_kid_that_a_fetch_lacked_is_refused_without_another(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, "nobody") == "401"
            assert endpoint.count == 2
            for _ in range(5):
                await time.advance(1)
                assert await outcome(keys, "nobody") == "401"
            assert endpoint.count == 2
            await time.advance(0.1)
            assert await outcome(keys, "nobody") == "401"
            assert endpoint.count == 3, "five seconds on it may exist"

    @pytest.mark.parametrize("kid", ["../../dev/null", "/etc/passwd", "x'--", "1;DROP", "https://evil.example/", "%00"])
    async def test_a_kid_that_no_database_makes_is_no_reason_to_fetch(
        self, endpoint: Endpoint, time: Time, kid: str
    ) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, kid) == "401"
            assert endpoint.count == 1
            endpoint.issuer.rotate(kid=kid)
            await time.advance(61)
            assert await outcome(keys, kid) == "ok", "it is a key like any other once it is published"

    @pytest.mark.parametrize(
        "kid", ["1", "0f8fad5b-d9cb-469f-a165-70867728950e", "V1StGXR8_Z5jdHi6B-myT", "a+b=", "urn:x"]
    )
    async def test_a_kid_that_a_database_makes_is_one(self, endpoint: Endpoint, time: Time, kid: str) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.issuer.rotate(kid=kid)
            assert await outcome(keys, kid) == "ok"

    async def test_without_budget_the_answer_is_later_not_no(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            answers = [await outcome(keys, f"made-up-{n}") for n in range(4)]
            assert answers == ["401", "401", "503", "503"]
            with pytest.raises(KeysUnavailable) as refusal:
                await keys.get("made-up-9")
            assert refusal.value.retry_after == 1
            await time.advance(5)
            assert [await outcome(keys, f"later-{n}") for n in range(2)] == ["401", "503"]
            await time.advance(50)
            assert [await outcome(keys, f"much-later-{n}") for n in range(3)] == ["401", "401", "503"]

    async def test_failed_attempts_count_against_the_budget(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.fails()
            for n in range(200):
                assert await outcome(keys, f"made-up-{n}") == "503"
            assert keys.status().fetches[FetchReason.UNKNOWN_KID] == 2

    async def test_a_kid_asked_for_too_early_is_not_locked_out(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, "2") == "401"  # a serial kid can be guessed
            endpoint.issuer.rotate(kid="2")
            assert await outcome(keys, "2") == "401"
            assert await outcome(keys, "nobody") == "401"  # its fetch brings a changed set
            assert await outcome(keys, "2") == "ok"

    async def test_the_memo_of_absent_kids_is_emptied_when_the_set_changes(
        self, endpoint: Endpoint, time: Time
    ) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, "soon") == "401"
            endpoint.issuer.rotate()
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"
            await time.advance(4.9)
            endpoint.issuer.rotate(kid="soon")
            await time.advance(0.05)
            assert await outcome(keys, "soon") == "503", "neither known to be absent nor in the budget"
            await time.advance(0.1)
            assert await outcome(keys, "soon") == "ok"

    async def test_the_memo_is_bounded(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            for n in range(1100):
                await time.advance(5)
                assert await outcome(keys, f"made-up-{n}") == "401"
            assert len(keys._cache._absent) == 1024

    @pytest.mark.usefixtures("briefly")
    async def test_at_most_32_wait(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            asking = [asyncio.ensure_future(outcome(keys, f"made-up-{n}")) for n in range(100)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert keys.status().waiting == 32
            assert [task.done() for task in asking] == [False] * 32 + [True] * 68
            assert {task.result() for task in asking[32:]} == {"503"}
            assert {await task for task in asking} == {"503"}, "those who waited give up after their two seconds"
            assert keys.status().waiting == 0
            assert endpoint.count == 2

    async def test_an_attempt_begun_too_long_ago_proves_nothing(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            await time.advance(61)
            time.elapsed += 5.1  # the refresh has been under way for so long
            asking = asyncio.ensure_future(outcome(keys, "unknown"))
            await settle()
            endpoint.open.set()
            assert await asking == "503"

    async def test_one_that_gives_up_takes_nobody_along(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            new = endpoint.issuer.rotate()
            endpoint.open.clear()
            impatient, patient = (asyncio.ensure_future(outcome(keys, new.kid)) for _ in range(2))
            await settle()
            impatient.cancel()
            await settle()
            assert keys.status().waiting == 1
            endpoint.open.set()
            assert await patient == "ok"
            assert endpoint.count == 2

    async def test_a_flood_of_made_up_kids(self, endpoint: Endpoint, time: Time) -> None:
        """10,000 in ten seconds: four fetches, good traffic unharmed; a rotation amid them shows within 5 s."""
        async with remote_keys(endpoint, time) as keys:
            known = endpoint.issuer.key.kid
            for n in range(10_000):
                time.elapsed += 0.001
                assert await outcome(keys, f"made-up-{n}") in {"401", "503"}
                if n % 10 == 0:
                    assert await outcome(keys, known) == "ok"
            assert endpoint.count - 1 <= 4
            new = endpoint.issuer.rotate()
            started = time.elapsed
            n = 0
            while await outcome(keys, new.kid) != "ok":
                time.elapsed += 0.001
                n += 1
                assert await outcome(keys, f"made-up-again-{n}") in {"401", "503"}
            assert time.elapsed - started <= 5


class TestBadSignature:
    async def test_a_kid_given_to_another_key(self, time: Time) -> None:
        """Two databases with serial ids call their first key "1"."""
        endpoint = Endpoint(LocalIssuer(clock=time.clock))
        endpoint.issuer.rotate(kid="1", keep=False)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys, monotonic=time.monotonic)
            old = endpoint.issuer.token("old")
            await verifier.verify(old)
            endpoint.issuer.rotate(kid="1", keep=False)
            assert (await verifier.verify(endpoint.issuer.token("new"))).subject == "new"
            assert keys.status().fetches[FetchReason.BAD_SIGNATURE] == 1
            with pytest.raises(InvalidToken) as refusal:
                await verifier.verify(old)
            assert refusal.value.reason is Reason.BAD_SIGNATURE

    async def test_another_algorithm_under_the_same_kid(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.issuer.rotate("ES256", kid=endpoint.issuer.key.kid, keep=False)
            verifier = endpoint.issuer.verifier(keys)
            assert (await verifier.verify(endpoint.issuer.token())).subject == "user1"

    async def test_forgeries_cost_one_fetch_in_five_seconds_and_are_401(self, endpoint: Endpoint, time: Time) -> None:
        stranger = SigningKey.generate("EdDSA", endpoint.issuer.key.kid)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            for n in range(900):
                time.elapsed += 0.01
                time.wall += 0.01
                with pytest.raises(InvalidToken) as refusal:
                    await verifier.verify(endpoint.issuer.token(f"u{n}", key=stranger))
                assert refusal.value.reason is Reason.BAD_SIGNATURE
            assert keys.status().fetches[FetchReason.BAD_SIGNATURE] == 2
            new = endpoint.issuer.rotate()
            assert await outcome(keys, new.kid) == "ok", "they leave something for a rotation"

    async def test_a_kid_given_away_amid_forgeries(self, endpoint: Endpoint, time: Time) -> None:
        """Whatever brings the new set, the key is judged anew then, though it was looked up just before."""
        stranger = SigningKey.generate("EdDSA", endpoint.issuer.key.kid)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            with pytest.raises(InvalidToken):
                await verifier.verify(endpoint.issuer.token(key=stranger))
            endpoint.issuer.rotate(kid=endpoint.issuer.key.kid, keep=False)
            endpoint.issuer.rotate()
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"
            token = endpoint.issuer.token(key=endpoint.issuer.keys[0])
            assert (await verifier.verify(token)).subject == "user1"
            time.elapsed += 5
            endpoint.issuer.keys[0] = SigningKey.generate("EdDSA", stranger.kid)
            token = endpoint.issuer.token(key=endpoint.issuer.keys[0])
            assert (await verifier.verify(token)).subject == "user1"

    async def test_those_for_whom_there_is_no_room_to_wait_are_not_refused(
        self, endpoint: Endpoint, time: Time
    ) -> None:
        """A database was made anew, and a hundred good tokens come at once: nobody is told that theirs is forged."""
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.issuer.rotate(kid=endpoint.issuer.key.kid, keep=False)
            endpoint.open.clear()
            waiting = [asyncio.create_task(verifier.verify(endpoint.issuer.token(f"u{n}"))) for n in range(100)]
            await settle()
            endpoint.open.set()
            answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(answer).__name__ for answer in answers] == ["Principal"] * 32 + ["KeysUnavailable"] * 68
            assert keys.status().fetches[FetchReason.BAD_SIGNATURE] == 1

    async def test_nor_is_one_who_waits_too_long(
        self, endpoint: Endpoint, time: Time, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote_keys_module, "WAIT_TIMEOUT", 0.01)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.issuer.rotate(kid=endpoint.issuer.key.kid, keep=False)
            endpoint.open.clear()
            with pytest.raises(KeysUnavailable):
                await verifier.verify(endpoint.issuer.token())

    async def test_an_attempt_that_failed_confirms_nothing(self, endpoint: Endpoint, time: Time) -> None:
        stranger = SigningKey.generate("EdDSA", endpoint.issuer.key.kid)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.fails()
            with pytest.raises(InvalidToken):
                await verifier.verify(endpoint.issuer.token(key=stranger))
            endpoint.recovers()
            endpoint.issuer.rotate(kid=stranger.kid, keep=False)
            assert (await verifier.verify(endpoint.issuer.token())).subject == "user1"

    async def test_while_the_endpoint_fails_they_are_401_all_the_same(self, endpoint: Endpoint, time: Time) -> None:
        stranger = SigningKey.generate("EdDSA", endpoint.issuer.key.kid)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.fails()
            await time.advance(20)
            for _ in range(10):
                with pytest.raises(InvalidToken):
                    await verifier.verify(endpoint.issuer.token(key=stranger))
            assert keys.status().fetches[FetchReason.BAD_SIGNATURE] == 2


class TestOutage:
    async def test_59_minutes_harm_nobody(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.fails()
            for _ in range(59):
                await time.advance(60)
                assert await outcome(keys, endpoint.issuer.key.kid) == "ok"
            assert keys.ready

    async def test_past_the_bound_it_is_503_and_heals_by_itself(self, endpoint: Endpoint, time: Time) -> None:
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

    async def test_past_the_bound_a_request_may_heal_it(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.fails()
            await time.advance(3700)
            assert [await outcome(keys, endpoint.issuer.key.kid) for _ in range(4)] == ["503"] * 4
            assert keys.status().fetches[FetchReason.NO_KEYS] <= 2
            endpoint.recovers()
            time.elapsed += 5
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"

    async def test_a_cached_token_does_not_outlive_the_bound(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time, max_stale=100) as keys:
            verifier = endpoint.issuer.verifier(keys, monotonic=time.monotonic)
            token = endpoint.issuer.token()
            endpoint.fails()
            await verifier.verify(token)
            await time.advance(101)
            with pytest.raises(KeysUnavailable):
                await verifier.verify(token)

    @pytest.mark.parametrize(
        ("random", "naps"), [(1.0, [1, 2, 4, 8, 16, 30, 30, 30]), (0.5, [0.5, 1, 2, 4, 8, 15, 15]), (0.0, [])]
    )
    async def test_the_background_backs_off_with_full_jitter(
        self, endpoint: Endpoint, time: Time, random: float, naps: list[float]
    ) -> None:
        async with remote_keys(endpoint, time, random=lambda: random):
            endpoint.fails()
            time.naps.clear()
            await time.advance(65 if random == 0 else 200)
            assert time.naps[: len(naps)] == naps
            assert endpoint.count > len(naps)

    async def test_a_success_ends_the_backoff(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time, random=lambda: 1.0):
            endpoint.fails()
            await time.advance(200)
            endpoint.recovers()
            await time.advance(30)
            endpoint.fails()
            time.naps.clear()
            await time.advance(70)
            assert time.naps[0] == 1

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
            endpoint.answer = lambda: httpx.Response(429, headers=headers)
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
        ("answer", "error"),
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
    async def test_a_bad_answer_changes_nothing(
        self, endpoint: Endpoint, time: Time, answer: httpx.Response, error: str
    ) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.answer = lambda: answer
            await time.advance(61)
            status = keys.status()
            assert (status.ready, status.last_error, status.failures) == (True, error, 2)
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"
            endpoint.recovers()
            await time.advance(61)
            assert keys.status().last_error is None

    async def test_one_bad_key_does_not_spoil_the_rest(self, endpoint: Endpoint, time: Time) -> None:
        good = json.dumps(endpoint.issuer.key.jwk)
        body = f'{{"keys": [{{"kid": "twice", "kid": "twice"}}, {{"kty": "oct", "kid": "secret", "k": "AA"}}, {good}]}}'
        endpoint.answer = lambda: httpx.Response(200, content=body.encode())
        async with remote_keys(endpoint, time) as keys:
            assert keys.ready
            assert keys.status().skipped == (
                SkippedKey("twice", "not a JWK"),
                SkippedKey("secret", "private or symmetric"),
            )

    async def test_whatever_a_client_raises_the_refresh_goes_on(self, endpoint: Endpoint, time: Time) -> None:
        def explode() -> httpx.Response:
            raise LookupError("secret-token")

        async with remote_keys(endpoint, time) as keys:
            endpoint.answer = explode
            await time.advance(120)
            assert keys.status().last_error == "LookupError"
            endpoint.recovers()
            await time.advance(61)
            assert keys.status().last_error is None


class TestColdStart:
    async def test_a_hundred_requests_are_one_fetch(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.open.clear()
        async with remote_keys(endpoint, time) as keys:
            asking = [asyncio.ensure_future(outcome(keys, endpoint.issuer.key.kid)) for _ in range(100)]
            await settle()
            assert keys.status().waiting == 100
            endpoint.open.set()
            assert Counter(await asyncio.gather(*asking)) == {"ok": 100}
            assert endpoint.count == 1

    async def test_its_fetch_settles_unknown_kids_too(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.open.clear()
        async with remote_keys(endpoint, time) as keys:
            asking = asyncio.ensure_future(outcome(keys, "nobody"))
            await settle()
            endpoint.open.set()
            assert await asking == "401"
            assert endpoint.count == 1

    async def test_an_issuer_that_comes_up_a_moment_later(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.fails()
        async with remote_keys(endpoint, time) as keys:
            asking = [asyncio.ensure_future(outcome(keys, endpoint.issuer.key.kid)) for _ in range(10)]
            await settle()
            endpoint.recovers()
            await time.advance(1)
            assert Counter(await asyncio.gather(*asking)) == {"ok": 10}

    @pytest.mark.usefixtures("briefly")
    async def test_an_issuer_that_is_down(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.fails()
        async with remote_keys(endpoint, time) as keys:
            assert not keys.ready
            answers = await asyncio.gather(*(outcome(keys, endpoint.issuer.key.kid) for _ in range(100)))
            assert Counter(answers) == {"503": 100}
            assert keys.status().fetches[FetchReason.NO_KEYS] <= 2
            assert keys.status().age is None
            assert keys.status().kids == ()
            assert keys.status().skipped == ()
            endpoint.recovers()
            await time.advance(5)
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"


class TestLife:
    async def test_nothing_is_left_behind(self, endpoint: Endpoint, time: Time) -> None:
        before = asyncio.all_tasks()
        endpoint.open.clear()
        async with remote_keys(endpoint, time):
            assert len(asyncio.all_tasks() - before) == 2
        assert asyncio.all_tasks() == before

    async def test_leaving_while_requests_wait(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            asking = asyncio.ensure_future(outcome(keys, "unknown"))
            await settle()
        assert await asking == "503"
        assert await outcome(keys, "another") == "503"
        time.elapsed += 100
        assert keys.current(endpoint.issuer.key.kid), "what is still running may finish"

    async def test_must_be_entered_and_only_once(self, endpoint: Endpoint, time: Time) -> None:
        keys = RemoteKeys(endpoint.issuer.jwks_url)
        assert keys.current("a") is None
        with pytest.raises(RuntimeError, match="must be entered"):
            await keys.get("a")
        async with remote_keys(endpoint, time) as keys:
            with pytest.raises(RuntimeError, match="once"):
                await keys.__aenter__()

    async def test_a_request_in_the_midst_of_leaving_starts_nothing(self, endpoint: Endpoint, time: Time) -> None:
        others = asyncio.all_tasks()
        async with remote_keys(endpoint, time) as keys:
            leaving = asyncio.create_task(keys.__aexit__(None, None, None))
            await asyncio.sleep(0)
            time.elapsed += 100
            assert await outcome(keys, "unknown") == "503"
            assert keys.current(endpoint.issuer.key.kid) is not None
            await leaving
            started = asyncio.all_tasks() - others
            assert [task for task in started if task.get_name().startswith("key set")] == []

    async def test_a_task_that_is_done_before_it_can_be_noted_down(self, time: Time) -> None:
        """As an eager task factory makes them (Python 3.12): here the attempt has nothing to wait for."""
        issuer = LocalIssuer(clock=time.clock)
        endpoint = Endpoint(issuer)
        async with remote_keys(endpoint, time) as keys:
            keys._fetch_task = asyncio.get_running_loop().create_future()  # type: ignore[assignment]  # a task that is done
            keys._fetch_task.set_result(True)  # type: ignore[union-attr]
            issuer.rotate()
            assert await outcome(keys, issuer.key.kid) == "ok"
            before = endpoint.count
            await time.advance(70)
            assert endpoint.count > before

    async def test_two_do_not_know_each_other(self, time: Time) -> None:
        one, two = (Endpoint(LocalIssuer(clock=time.clock)) for _ in range(2))
        one.issuer.rotate(kid="one", keep=False)
        async with remote_keys(one, time) as first, remote_keys(two, time) as second:
            assert await outcome(first, "one") == "ok"
            assert await outcome(second, "one") == "401"
            assert await outcome(first, "one") == "ok"


class TestSeenFromOutside:
    async def test_status_and_observer(self, endpoint: Endpoint, time: Time) -> None:
        seen: list[Any] = []

        class Recorder(Observer):
            def fetched(self, reason: FetchReason, seconds: float, error: str | None) -> None:
                seen.append((reason.value, seconds, error))

            def unknown_kid(self, answer: Literal["found", "absent", "unavailable"]) -> None:
                seen.append(answer)

        async with remote_keys(endpoint, time, observer=Recorder()) as keys:
            await time.advance(10)
            status = keys.status()
            assert (status.ready, status.age, status.last_error, status.failures) == (True, 10, None, 0)
            assert status.kids == (endpoint.issuer.key.kid,)
            new = endpoint.issuer.rotate()
            for kid in new.kid, "nobody", "nobody", "budget-is-gone":
                await outcome(keys, kid)
            assert seen == [
                ("refresh", 0, None),
                ("unknown_kid", 0, None),
                "found",
                ("unknown_kid", 0, None),
                "absent",
                "absent",
                "unavailable",
            ]
            assert keys.status().unknown_kids == 4
            with pytest.raises(TypeError):
                keys.status().fetches[FetchReason.REFRESH] = 0  # type: ignore[index]  # that it cannot be is the test

    async def test_the_log_tells_changes_once(
        self, endpoint: Endpoint, time: Time, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "backend.auth")
        kid = endpoint.issuer.key.kid
        async with remote_keys(endpoint, time):
            endpoint.fails()
            await time.advance(300)
            good, bad = endpoint.issuer.key.jwk, {"kid": "a\nb"}
            endpoint.answer = lambda: httpx.Response(200, json={"keys": [bad, good]})
            await time.advance(60)
            endpoint.answer = lambda: httpx.Response(200, json={"keys": [good, bad]})
            await time.advance(60)
        assert caplog.messages == [
            f"JWKS changed, key ids: {kid}",
            "JWKS refresh failed: cannot connect: Connection refused",
            "JWKS key ignored: kid None: no usable kid",
            "JWKS refresh recovered",
        ]


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


async def test_static_keys(issuer: LocalIssuer) -> None:
    keys = StaticKeys(issuer.jwks)
    key = await keys.get(issuer.key.kid)
    assert keys.current(issuer.key.kid) is key
    assert keys.current("another") is None
    assert await keys.replacement(key) is None
    with pytest.raises(InvalidToken):
        await keys.get("another")
