"""Unknown kids and invalid signatures: a key rotation is found at once, and a flood causes few fetches."""

import asyncio
from collections import Counter

import pytest

from backend.auth import FetchReason, InvalidToken, KeysUnavailable, Reason
from backend.auth.testing import LocalIssuer, SigningKey
from tests.auth.scripted import Endpoint, Time, outcome, remote_keys, settle


class TestUnknownKid:
    async def test_a_rotation_causes_one_fetch(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            new = endpoint.issuer.rotate()
            assert Counter(await asyncio.gather(*(outcome(keys, new.kid) for _ in range(20)))) == {"ok": 20}
            assert endpoint.count == 2
            assert keys.status().fetches[FetchReason.UNKNOWN_KID] == 1
            assert keys.status().unknown_kids == 20

    async def test_a_kid_missing_from_a_recent_fetch_is_401(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, "missing") == "401"
            assert endpoint.count == 2
            for _ in range(5):
                await time.advance(1)
                assert await outcome(keys, "missing") == "401"
            assert endpoint.count == 2
            await time.advance(0.1)
            assert await outcome(keys, "missing") == "401"
            assert endpoint.count == 3, "it may exist after five seconds"

    @pytest.mark.parametrize("kid", ["../../dev/null", "x'--", "https://evil.example/", "%00"])
    async def test_a_kid_with_unusual_characters_causes_no_fetch(
        self, endpoint: Endpoint, time: Time, kid: str
    ) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, kid) == "401"
            assert endpoint.count == 1
            endpoint.issuer.rotate(kid=kid)
            await time.advance(61)
            assert await outcome(keys, kid) == "ok", "after the next refresh it works like any other key"

    @pytest.mark.parametrize(
        "kid", ["1", "0f8fad5b-d9cb-469f-a165-70867728950e", "V1StGXR8_Z5jdHi6B-myT", "a+b=", "urn:x"]
    )
    async def test_a_kid_with_usual_characters_causes_a_fetch(self, endpoint: Endpoint, time: Time, kid: str) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.issuer.rotate(kid=kid)
            assert await outcome(keys, kid) == "ok"

    async def test_without_budget_unknown_kids_are_503_not_401(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            outcomes = [await outcome(keys, f"made-up-{n}") for n in range(4)]
            assert outcomes == ["401", "401", "503", "503"]
            with pytest.raises(KeysUnavailable) as refusal:
                await keys.get("made-up-9")
            assert refusal.value.retry_after == 1
            await time.advance(5)
            assert [await outcome(keys, f"later-{n}") for n in range(2)] == ["401", "503"]
            await time.advance(50)
            assert [await outcome(keys, f"much-later-{n}") for n in range(3)] == ["401", "401", "503"]

    async def test_failed_fetches_count_against_the_budget(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.fails()
            for n in range(200):
                assert await outcome(keys, f"made-up-{n}") == "503"
            assert keys.status().fetches[FetchReason.UNKNOWN_KID] == 2

    async def test_a_kid_requested_before_it_exists_is_found_later(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, "2") == "401"  # a serial kid can be guessed
            endpoint.issuer.rotate(kid="2")
            assert await outcome(keys, "2") == "401"
            assert await outcome(keys, "missing") == "401"  # its fetch returns a changed set
            assert await outcome(keys, "2") == "ok"

    async def test_absent_kids_are_forgotten_when_the_set_changes(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            assert await outcome(keys, "soon") == "401"
            endpoint.issuer.rotate()
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"
            await time.advance(4.9)
            endpoint.issuer.rotate(kid="soon")
            await time.advance(0.05)
            assert await outcome(keys, "soon") == "503", "not known to be absent, and the budget is spent"
            await time.advance(0.1)
            assert await outcome(keys, "soon") == "ok"

    async def test_the_number_of_remembered_absent_kids_is_bounded(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            for n in range(1100):
                await time.advance(5)
                assert await outcome(keys, f"made-up-{n}") == "401"
            assert len(keys._cache._absent) == 1024

    @pytest.mark.usefixtures("short_wait")
    async def test_at_most_32_requests_wait(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            lookups = [asyncio.ensure_future(outcome(keys, f"made-up-{n}")) for n in range(100)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert keys.status().waiting == 32
            assert [task.done() for task in lookups] == [False] * 32 + [True] * 68
            assert {task.result() for task in lookups[32:]} == {"503"}
            assert {await task for task in lookups} == {"503"}, "waiting requests give up after WAIT_TIMEOUT"
            assert keys.status().waiting == 0
            assert endpoint.count == 2

    async def test_an_old_fetch_does_not_prove_a_kid_absent(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            await time.advance(61)
            time.elapsed += 5.1  # the refresh has been running for that long
            lookup = asyncio.ensure_future(outcome(keys, "unknown"))
            await settle()
            endpoint.open.set()
            assert await lookup == "503"

    async def test_a_cancelled_request_does_not_cancel_the_shared_fetch(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            new = endpoint.issuer.rotate()
            endpoint.open.clear()
            cancelled, other = (asyncio.ensure_future(outcome(keys, new.kid)) for _ in range(2))
            await settle()
            cancelled.cancel()
            await settle()
            assert keys.status().waiting == 1
            endpoint.open.set()
            assert await other == "ok"
            assert endpoint.count == 2

    async def test_a_flood_of_unknown_kids_causes_four_fetches_and_hides_no_rotation(
        self, endpoint: Endpoint, time: Time
    ) -> None:
        """10,000 unknown kids in 10 s; known kids stay valid, and a rotation takes effect within 5 s."""
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
    async def test_a_reassigned_kid_is_found_and_its_old_tokens_are_refused(self, time: Time) -> None:
        """Two databases with serial ids both assign kid "1" to their first key."""
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

    async def test_a_kid_reassigned_to_another_algorithm_is_found(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.issuer.rotate("ES256", kid=endpoint.issuer.key.kid, keep=False)
            verifier = endpoint.issuer.verifier(keys)
            assert (await verifier.verify(endpoint.issuer.token())).subject == "user1"

    async def test_forgeries_cause_one_fetch_in_five_seconds_and_are_401(self, endpoint: Endpoint, time: Time) -> None:
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
            assert await outcome(keys, new.kid) == "ok", "some budget is left for a rotation"

    async def test_a_kid_reassigned_during_forgeries_is_found(self, endpoint: Endpoint, time: Time) -> None:
        """A changed set invalidates the result of the last check, whichever request fetched it."""
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

    async def test_requests_beyond_the_waiting_limit_are_503_not_401(self, endpoint: Endpoint, time: Time) -> None:
        """A hundred valid tokens arrive at once after the database was recreated: none is reported as forged."""
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.issuer.rotate(kid=endpoint.issuer.key.kid, keep=False)
            endpoint.open.clear()
            waiting = [asyncio.create_task(verifier.verify(endpoint.issuer.token(f"u{n}"))) for n in range(100)]
            await settle()
            endpoint.open.set()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(result).__name__ for result in results] == ["Principal"] * 32 + ["KeysUnavailable"] * 68
            assert keys.status().fetches[FetchReason.BAD_SIGNATURE] == 1

    @pytest.mark.usefixtures("short_wait")
    async def test_requests_that_wait_too_long_are_503_not_401(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.issuer.rotate(kid=endpoint.issuer.key.kid, keep=False)
            endpoint.open.clear()
            with pytest.raises(KeysUnavailable):
                await verifier.verify(endpoint.issuer.token())

    async def test_a_failed_fetch_does_not_prove_a_key_unchanged(self, endpoint: Endpoint, time: Time) -> None:
        stranger = SigningKey.generate("EdDSA", endpoint.issuer.key.kid)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.fails()
            with pytest.raises(InvalidToken):
                await verifier.verify(endpoint.issuer.token(key=stranger))
            endpoint.recovers()
            endpoint.issuer.rotate(kid=stranger.kid, keep=False)
            assert (await verifier.verify(endpoint.issuer.token())).subject == "user1"

    async def test_forgeries_are_401_while_the_endpoint_fails(self, endpoint: Endpoint, time: Time) -> None:
        stranger = SigningKey.generate("EdDSA", endpoint.issuer.key.kid)
        async with remote_keys(endpoint, time) as keys:
            verifier = endpoint.issuer.verifier(keys)
            endpoint.fails()
            await time.advance(20)
            for _ in range(10):
                with pytest.raises(InvalidToken):
                    await verifier.verify(endpoint.issuer.token(key=stranger))
            assert keys.status().fetches[FetchReason.BAD_SIGNATURE] == 2
