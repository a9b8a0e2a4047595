"""Start and exit of RemoteKeys, and its status, log and observer."""

import asyncio
import logging
from collections import Counter
from typing import Any, Literal

import httpx
import pytest

from backend.auth import FetchReason, Observer, RemoteKeys
from backend.auth.testing import LocalIssuer
from tests.auth.scripted import Endpoint, Time, outcome, remote_keys, settle


class TestColdStart:
    async def test_a_hundred_requests_share_one_fetch(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.open.clear()
        async with remote_keys(endpoint, time) as keys:
            lookups = [asyncio.ensure_future(outcome(keys, endpoint.issuer.key.kid)) for _ in range(100)]
            await settle()
            assert keys.status().waiting == 100
            endpoint.open.set()
            assert Counter(await asyncio.gather(*lookups)) == {"ok": 100}
            assert endpoint.count == 1

    async def test_the_first_fetch_also_answers_for_unknown_kids(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.open.clear()
        async with remote_keys(endpoint, time) as keys:
            lookup = asyncio.ensure_future(outcome(keys, "missing"))
            await settle()
            endpoint.open.set()
            assert await lookup == "401"
            assert endpoint.count == 1

    async def test_requests_wait_for_an_issuer_that_starts_after_the_api(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.fails()
        async with remote_keys(endpoint, time) as keys:
            lookups = [asyncio.ensure_future(outcome(keys, endpoint.issuer.key.kid)) for _ in range(10)]
            await settle()
            endpoint.recovers()
            await time.advance(1)
            assert Counter(await asyncio.gather(*lookups)) == {"ok": 10}

    @pytest.mark.usefixtures("short_wait")
    async def test_requests_are_503_until_the_issuer_is_reachable(self, endpoint: Endpoint, time: Time) -> None:
        endpoint.fails()
        async with remote_keys(endpoint, time) as keys:
            assert not keys.ready
            outcomes = await asyncio.gather(*(outcome(keys, endpoint.issuer.key.kid) for _ in range(100)))
            assert Counter(outcomes) == {"503": 100}
            assert keys.status().fetches[FetchReason.NO_KEYS] <= 2
            assert keys.status().age is None
            assert keys.status().kids == ()
            assert keys.status().skipped == ()
            endpoint.recovers()
            await time.advance(5)
            assert await outcome(keys, endpoint.issuer.key.kid) == "ok"


class TestLifecycle:
    async def test_no_task_is_left_running(self, endpoint: Endpoint, time: Time) -> None:
        before = asyncio.all_tasks()
        endpoint.open.clear()
        async with remote_keys(endpoint, time):
            assert len(asyncio.all_tasks() - before) == 2
        assert asyncio.all_tasks() == before

    async def test_waiting_requests_are_503_on_exit(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            endpoint.open.clear()
            lookup = asyncio.ensure_future(outcome(keys, "unknown"))
            await settle()
        assert await lookup == "503"
        assert await outcome(keys, "another") == "503"
        time.elapsed += 100
        assert keys.current(endpoint.issuer.key.kid), "requests that are still running can finish"

    async def test_the_context_must_be_entered_exactly_once(self, endpoint: Endpoint, time: Time) -> None:
        keys = RemoteKeys(endpoint.issuer.jwks_url)
        assert keys.current("a") is None
        with pytest.raises(RuntimeError, match="must be entered"):
            await keys.get("a")
        async with remote_keys(endpoint, time) as keys:
            with pytest.raises(RuntimeError, match="once"):
                await keys.__aenter__()

    async def test_a_request_during_exit_starts_no_task(self, endpoint: Endpoint, time: Time) -> None:
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

    async def test_a_fetch_that_ends_before_it_is_assigned_blocks_no_later_fetch(self, time: Time) -> None:
        """An eager task factory (Python 3.12) finishes a fetch that does not wait before it returns the task."""
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

    async def test_two_instances_are_independent(self, time: Time) -> None:
        one, two = (Endpoint(LocalIssuer(clock=time.clock)) for _ in range(2))
        one.issuer.rotate(kid="one", keep=False)
        async with remote_keys(one, time) as first, remote_keys(two, time) as second:
            assert await outcome(first, "one") == "ok"
            assert await outcome(second, "one") == "401"
            assert await outcome(first, "one") == "ok"


class TestObservability:
    async def test_status_and_observer_report_fetches_and_unknown_kids(self, endpoint: Endpoint, time: Time) -> None:
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
            for kid in new.kid, "missing", "missing", "budget-is-gone":
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

    async def test_each_change_is_logged_once(
        self, endpoint: Endpoint, time: Time, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "backend.auth")
        kid = endpoint.issuer.key.kid
        async with remote_keys(endpoint, time):
            endpoint.fails()
            await time.advance(300)
            good, bad = endpoint.issuer.key.jwk, {"kid": "a\nb"}
            endpoint.respond = lambda: httpx.Response(200, json={"keys": [bad, good]})
            await time.advance(60)
            endpoint.respond = lambda: httpx.Response(200, json={"keys": [good, bad]})
            await time.advance(60)
        assert caplog.messages == [
            f"JWKS changed, key ids: {kid}",
            "JWKS refresh failed: cannot connect: Connection refused",
            "JWKS key ignored: kid None: no usable kid",
            "JWKS refresh recovered",
        ]
