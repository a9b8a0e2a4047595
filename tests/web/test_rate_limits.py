"""Rate limits: quotas of users, addresses and security events, and counts shared through Redis."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from backend.auth.testing import LocalIssuer
from backend.auth.verifier import TokenVerifier, verify_signature
from backend.settings import Settings
from backend.users.security_events.schemas import EventType
from backend.users.security_events.verification import SecurityEventVerifier
from backend.web.event_quotas import EventQuotas
from backend.web.quotas import Counters, Quota
from backend.web.rate_limits import RateLimits, reads_credentials
from backend.web.rate_limits_redis import STEP, STEPS, SharedCounters
from tests.conftest import Api, Person, running
from tests.support.redis_server import RedisServer, redis_server

TASKS = "/api/v1/tasks"
EVENTS = "/api/v1/security-events"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def limited(settings: Settings, issuer: LocalIssuer) -> Any:
    """`limited(rate, **settings)` starts the application with a rate limit."""

    @asynccontextmanager
    async def start(rate: str, **values: Any) -> AsyncIterator[Api]:
        async with running(settings.model_copy(update={"rate_limit": rate, **values}), issuer) as api:
            yield api

    return start


def limit(response: httpx.Response) -> tuple[str, str]:
    return response.headers["ratelimit-policy"], response.headers["ratelimit"].partition(";t=")[0]


def forged(person: Person, number: int) -> dict[str, str]:
    return {"Authorization": f"Bearer {person.token(n=number)[:-4]}AAAA"}


class TestCounters:
    def test_a_window_starts_with_the_first_hit_and_has_a_fixed_length(self) -> None:
        clock = Clock()
        counters = Counters(60, clock=clock)
        assert counters.hit("a") == (1, 60)
        clock.now += 45
        assert counters.hit("a") == (2, 15)
        assert counters.hit("b") == (1, 60)
        clock.now += 15
        assert counters.get("a") == (0, 0)
        assert counters.hit("a") == (1, 60)
        assert counters.get("b") == (1, 45)

    def test_ended_windows_are_removed(self) -> None:
        clock = Clock()
        counters = Counters(60, clock=clock)
        for number in range(1000):
            counters.hit(str(number))
        clock.now += 60
        counters.hit("new")
        assert len(counters) == 1

    def test_the_number_of_windows_is_bounded_and_the_oldest_is_evicted(self) -> None:
        clock = Clock()
        counters = Counters(60, size=3, clock=clock)
        for key in "abcd":
            counters.hit(key)
            clock.now += 1
        assert len(counters) == 3
        assert [counters.get(key)[0] for key in "abcd"] == [0, 1, 1, 1]

    def test_a_shared_count_replaces_the_local_one(self) -> None:
        clock = Clock()
        counters = Counters(60, clock=clock)
        counters.hit("a")
        counters.set("a", 41, 7)
        assert counters.hit("a") == (42, 7)


class TestUsers:
    async def test_responses_report_the_remaining_quota_until_it_is_exhausted(self, limited: Any) -> None:
        async with limited("3/hour") as api:
            ada = api.person()
            for left in 2, 1, 0:
                response = await ada.get(TASKS)
                assert response.status_code == 200
                assert limit(response) == ('"user";q=3;w=3600', f'"user";r={left}')
            refused = await ada.get(TASKS)
            assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
            assert refused.headers["content-type"] == "application/problem+json"
            assert limit(refused) == ('"user";q=3;w=3600', '"user";r=0')
            assert 3590 <= int(refused.headers["retry-after"]) <= 3600
            assert refused.headers["ratelimit"].endswith(f";t={refused.headers['retry-after']}")

    async def test_users_behind_one_address_have_separate_quotas(self, limited: Any) -> None:
        async with limited("2/hour") as api:
            for _ in range(5):
                ada = api.person()
                assert [(await ada.get(TASKS)).status_code for _ in range(3)] == [200, 200, 429]

    async def test_failed_requests_count_for_the_user(self, limited: Any) -> None:
        async with limited("2/hour") as api:
            ada = api.person()
            assert limit(await ada.get(f"{TASKS}/019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f"))[1] == '"user";r=1'
            assert limit(await ada.post(TASKS, {"nothing": 1}))[1] == '"user";r=0'
            assert (await ada.get(TASKS)).status_code == 429
            assert (await api.person().get(TASKS)).status_code == 200

    async def test_a_request_over_the_quota_causes_no_database_access(
        self, limited: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with limited("1/hour") as api:
            ada = api.person()
            await ada.get(TASKS)
            api.state["users"].invalidate(ada.subject)
            monkeypatch.setattr(api.state["pool"], "connection", None)
            assert (await ada.get(TASKS)).status_code == 429

    async def test_a_429_has_cors_headers(self, limited: Any) -> None:
        async with limited("1/hour") as api:
            ada, origin = api.person(), {"Origin": "https://app.example.com"}
            await ada.get(TASKS)
            refused = await ada.get(TASKS, headers=origin)
            assert refused.status_code == 429
            assert refused.headers["access-control-allow-origin"] == "https://app.example.com"


class TestAddresses:
    async def test_an_address_over_its_limit_is_refused_before_any_signature_check(
        self, limited: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with limited("5/hour") as api:
            ada = api.person()
            for number in range(5):
                refused = await api.http.get(TASKS, headers=forged(ada, number))
                assert refused.status_code == 401
                assert limit(refused) == ('"address";q=5;w=3600', f'"address";r={4 - number}')

            async def verify(*_: object) -> None:
                raise AssertionError("a token was verified")

            monkeypatch.setattr(TokenVerifier, "_verify", verify)
            for number in range(20):
                refused = await api.http.get(TASKS, headers=forged(ada, number))
                assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
                assert limit(refused)[1] == '"address";r=0'

    async def test_recently_authenticated_users_behind_a_limited_address_keep_working(self, limited: Any) -> None:
        async with limited("5/hour") as api:
            ada, late = api.person(), api.person()
            assert (await ada.get(TASKS)).status_code == 200
            for number in range(6):
                await api.http.get(TASKS, headers=forged(late, number))
            assert limit(await ada.get(TASKS)) == ('"user";q=5;w=3600', '"user";r=3')
            assert (await late.get(TASKS)).status_code == 429
            malformed = {"Authorization": "Bearer " + "x" * 40_000}
            assert (await api.http.get(TASKS, headers=malformed)).status_code == 429

    async def test_a_verified_token_lifts_no_limit_of_requests_that_no_route_authorizes(self, limited: Any) -> None:
        async with limited("3/hour") as api:
            ada = api.person()
            assert (await ada.get(TASKS)).status_code == 200
            for _ in range(3):
                await api.http.get("/nowhere")
            answers = [await ada.get("/api/v1/nowhere") for _ in range(4)]
            assert [answer.status_code for answer in answers] == [404, 404, 429, 429]
            assert [limit(answer)[1] for answer in answers[:3]] == ['"user";r=1', '"user";r=0', '"user";r=0']

    @pytest.mark.parametrize("path", ["/", "/openapi.json", "/nowhere", TASKS])
    async def test_requests_without_credentials_count_for_the_address(self, limited: Any, path: str) -> None:
        async with limited("1/hour") as api:
            assert limit(await api.http.get(path))[0] == '"address";q=1;w=3600'
            assert (await api.http.get(path)).status_code == 429

    @pytest.mark.parametrize("path", ["/", "/openapi.json", "/nowhere"])
    async def test_public_paths_count_for_the_address_despite_a_valid_token(self, limited: Any, path: str) -> None:
        async with limited("2/hour") as api:
            ada = api.person()
            assert (await ada.get(TASKS)).status_code == 200
            assert [limit(await ada.get(path))[1] for _ in range(2)] == ['"address";r=1', '"address";r=0']
            assert (await ada.get(path)).status_code == 429
            assert (await ada.get(TASKS)).status_code == 200

    async def test_every_authenticated_operation_counts_for_the_user(self, api: Api) -> None:
        for path, operations in api.app.openapi()["paths"].items():
            for operation in operations.values():
                assert reads_credentials(path) == ("security" in operation), path

    @pytest.mark.parametrize("path", ["/livez", "/readyz"])
    async def test_health_checks_are_not_limited(self, limited: Any, path: str) -> None:
        async with limited("1/hour") as api:
            await api.http.get("/")
            for _ in range(3):
                response = await api.http.get(path)
                assert response.status_code in (200, 503)
                assert "ratelimit" not in response.headers

    async def test_preflight_requests_are_not_counted(self, limited: Any) -> None:
        async with limited("1/hour") as api:
            preflight = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "GET"}
            for _ in range(3):
                assert (await api.http.options(TASKS, headers=preflight)).status_code == 200
            assert (await api.http.get("/")).status_code == 200

    async def test_errors_of_the_server_are_not_counted(self, limited: Any) -> None:
        async with limited("1/hour", better_auth_jwks_url="http://127.0.0.1:9/jwks") as api:
            for _ in range(2):
                response = await api.person().get(TASKS)
                assert (response.status_code, "ratelimit" in response.headers) == (503, False)

    async def test_rate_limits_can_be_switched_off(self, limited: Any) -> None:
        async with limited("off") as api:
            assert "ratelimit" not in (await api.http.get("/")).headers
            assert "ratelimit" not in (await api.person().get(TASKS)).headers


async def send_event(api: Api, body: str, **headers: str) -> httpx.Response:
    return await api.http.post(EVENTS, content=body, headers={"Content-Type": "application/secevent+jwt"} | headers)


def ban(api: Api) -> str:
    return api.issuer.security_event("user1", EventType.account_disabled)


def forged_ban(api: Api) -> str:
    return ban(api)[:-4] + "AAAA"


async def exhaust_quota_of_refused_events(api: Api) -> None:
    for left in range(EventQuotas.FAILED.amount - 1, -1, -1):
        refused = await send_event(api, forged_ban(api))
        assert refused.json()["err"] == "authentication_failed"
        assert limit(refused) == ('"address";q=60;w=60', f'"address";r={left}')


class TestSecurityEvents:
    async def test_events_and_requests_have_separate_quotas(self, limited: Any) -> None:
        async with limited("1/hour") as api:
            for _ in range(3):
                assert (await send_event(api, ban(api))).status_code == 202
                assert (await send_event(api, forged_ban(api))).status_code == 400
            assert [(await api.http.get("/")).status_code for _ in range(2)] == [200, 429]
            assert (await send_event(api, ban(api))).status_code == 202

    async def test_another_method_on_the_events_path_counts_as_a_request(self, limited: Any) -> None:
        async with limited("1/hour") as api:
            assert [(await api.http.get(EVENTS)).status_code for _ in range(2)] == [405, 429]

    @pytest.mark.parametrize("rate", ["5/hour", "off"])
    async def test_valid_events_are_accepted_when_the_quota_of_refused_ones_is_exhausted(
        self, limited: Any, monkeypatch: pytest.MonkeyPatch, rate: str
    ) -> None:
        async with limited(rate) as api:
            await exhaust_quota_of_refused_events(api)
            with monkeypatch.context() as patched:
                patched.setattr(SecurityEventVerifier, "_read", lambda *_: pytest.fail("claims were read"))
                for body in forged_ban(api), "x", "", "x" * 20_000:
                    refused = await send_event(api, body, **{"X-Forwarded-For": "192.0.2.7"})
                    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
                    assert 50 <= int(refused.headers["retry-after"]) <= 60
                    assert limit(refused)[1] == '"address";r=0'
            taken = await send_event(api, ban(api))
            assert (taken.status_code, limit(taken)) == (202, ('"issuer";q=10000;w=60', '"issuer";r=9999'))
            assert (await send_event(api, api.issuer.security_event("user1", aud="else"))).status_code == 429

    @pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {"Content-Length": "20000"}])
    async def test_events_refused_before_their_body_is_read_are_counted(
        self, limited: Any, headers: dict[str, str]
    ) -> None:
        async with limited("off") as api:
            assert limit(await send_event(api, "x", **headers))[1] == '"address";r=59'

    async def test_a_flood_of_forged_events_causes_a_bounded_number_of_signature_checks(
        self, limited: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, verified = Clock(), 0

        async def counted(*arguments: Any) -> Any:
            nonlocal verified
            verified += 1
            return await verify_signature(*arguments)

        async with limited("off") as api:
            monkeypatch.setattr(api.state["security_events"], "quotas", EventQuotas(clock=clock))
            await exhaust_quota_of_refused_events(api)
            monkeypatch.setattr("backend.users.security_events.verification.verify_signature", counted)
            body = forged_ban(api)
            for _ in range(600):
                assert (await send_event(api, body)).status_code == 429
            assert verified == EventQuotas.CHECKED.amount
            late = await send_event(api, ban(api))
            assert (late.status_code, late.headers["retry-after"]) == (429, "1")
            clock.now += 1
            assert (await send_event(api, ban(api))).status_code == 202
            long_header = api.issuer.security_event("user1", EventType.account_disabled, header={"x": "y" * 1000})
            assert (await send_event(api, long_header)).status_code == 429
            clock.now += 60
            assert (await send_event(api, long_header)).status_code == 202

    async def test_each_event_type_has_its_own_quota(self, limited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(EventQuotas, "VERIFIED", Quota(2, 60))
        async with limited("off") as api:
            sign_outs = [api.issuer.security_event(f"user{n}", EventType.session_revoked) for n in range(3)]
            assert [(await send_event(api, body)).status_code for body in sign_outs] == [202, 202, 429]
            refused = await send_event(api, sign_outs[2])
            assert refused.json()["code"] == "rate_limited"
            assert limit(refused) == ('"issuer";q=2;w=60', '"issuer";r=0')
            assert (await send_event(api, ban(api))).status_code == 202
            both = api.issuer.security_event("user1", EventType.account_enabled, EventType.session_revoked)
            assert (await send_event(api, both)).status_code == 429


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def generous_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, Redis may take longer than the usual timeout."""
    monkeypatch.setattr("backend.web.rate_limits_redis.STEP", 5)


@pytest.mark.needs("redis-server")
class TestShared:
    @pytest.mark.usefixtures("generous_timeout")
    async def test_workers_share_their_counts(self, limited: Any, redis: RedisServer) -> None:
        async with AsyncExitStack() as stack:
            apis = [await stack.enter_async_context(limited("40/hour", redis_url=redis.url)) for _ in range(4)]
            for api in apis:
                assert (await api.person().get(TASKS)).status_code == 200  # loads the key set
            ada = apis[0].person()
            answers = await asyncio.gather(
                *(api.http.get(TASKS, headers=ada.bearer) for _ in range(20) for api in apis)
            )
            statuses = [answer.status_code for answer in answers]
            assert (statuses.count(200), statuses.count(429)) == (40, 40)
            forgeries = [
                (await api.http.get(TASKS, headers=forged(ada, number))).status_code
                for number in range(15)
                for api in apis
            ]
            # Each worker may let one request pass before it learns the shared count of the address.
            assert 40 <= forgeries.count(401) <= 40 + len(apis)
            assert forgeries[-4:] == [429] * 4

    @pytest.mark.usefixtures("generous_timeout")
    async def test_concurrent_hits_take_one_round_trip(
        self, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = SharedCounters(redis.url, window=60)
        batches: list[int] = []
        ask = shared._query

        async def record(keys: list[str]) -> list[tuple[int, float]]:
            batches.append(len(keys))
            return await ask(keys)

        monkeypatch.setattr(shared, "_query", record)
        async with shared:
            found = await asyncio.gather(*(shared.hit("a") for _ in range(100)))
        assert sorted(hit[0] for hit in found if hit) == list(range(1, 101))
        assert all(hit and 0 < hit[1] <= 60 for hit in found)
        assert batches == [100]

    async def test_an_unresponsive_redis_is_skipped_until_it_responds_again(
        self, redis: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caplog.set_level(logging.INFO, "backend.web.rate_limits_redis")
        pauses: asyncio.Queue[asyncio.Event] = asyncio.Queue()

        async def sleep(_: float) -> None:
            over = asyncio.Event()
            await pauses.put(over)
            await over.wait()

        shared = SharedCounters(redis.url, window=60)
        monkeypatch.setattr("backend.web.rate_limits_redis.sleep", sleep)
        limits = RateLimits(Quota(10, 60), shared=shared)
        async with shared:
            assert (await limits.count("user", "ada")).used == 1
            redis.freeze()
            # The count continues from the last shared value.
            decisions = await asyncio.gather(*(limits.count("user", "ada") for _ in range(3)))
            assert sorted(decision.used for decision in decisions) == [2, 3, 4]
            assert not shared.up.is_set()
            step = shared.hit("ada")
            with pytest.raises(StopIteration):  # it returns without waiting
                step.send(None)
            (await pauses.get()).set()
            over = await pauses.get()  # still frozen
            assert not shared.up.is_set()
            redis.thaw()
            over.set()
            await shared.up.wait()
            assert (await limits.count("user", "bob")).used == 1
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        assert redis.url not in caplog.text

    async def test_limits_continue_locally_when_redis_fails(self, limited: Any, redis: RedisServer) -> None:
        async with limited("3/hour", redis_url=redis.url) as api:
            ada = api.person()
            assert (await ada.get(TASKS)).status_code == 200
            redis.kill()
            assert [(await ada.get(TASKS)).status_code for _ in range(3)] == [200, 200, 429]

    async def test_the_api_starts_without_redis(self, limited: Any) -> None:
        async with limited("1/hour", redis_url="redis://127.0.0.1:9") as api:
            ada = api.person()
            assert [(await ada.get(TASKS)).status_code for _ in range(2)] == [200, 429]

    @pytest.mark.usefixtures("generous_timeout")
    async def test_a_cancelled_hit_does_not_affect_another(self, redis: RedisServer) -> None:
        shared = SharedCounters(redis.url, window=60)
        async with shared:
            await shared.hit("a")
            cancelled, other = asyncio.create_task(shared.hit("a")), asyncio.create_task(shared.hit("a"))
            await asyncio.sleep(0)
            cancelled.cancel()
            assert await other == pytest.approx((3, 60), abs=1)

    @pytest.mark.usefixtures("generous_timeout")
    async def test_a_window_in_redis_always_gets_an_expiry(self, redis: RedisServer) -> None:
        shared = SharedCounters(redis.url, window=1)
        async with shared:
            assert (await shared.hit("a")) == (1, 1)
            await shared._redis.persist("a")  # removes the expiry
            hit = await shared.hit("a")
            assert hit is not None
            assert hit[0] == 2
            assert 0 < await shared._redis.pttl("a") <= 1000


def test_a_request_waits_for_redis_at_most_50_ms() -> None:
    assert STEPS * STEP <= 0.05
