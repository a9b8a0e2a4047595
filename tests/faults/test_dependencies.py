"""Redis and the issuer fail under load: requests with known keys succeed."""

import asyncio
import logging
from typing import Any

import httpx
import pytest

from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from tests.auth.loopback import Script, hangs, says, says_json, serving
from tests.conftest import AUDIENCE, ISSUER, running
from tests.faults.load import CLIENTS, PATIENCE, TASKS, Load
from tests.support.redis_server import redis_server


@pytest.mark.needs("redis-server")
@pytest.mark.parametrize("is_frozen", [False, True], ids=["killed", "frozen"])
async def test_requests_succeed_while_redis_is_unavailable(
    settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture, is_frozen: bool
) -> None:
    caplog.set_level(logging.INFO, "backend.web.rate_limits_redis")
    with redis_server() as redis:
        values = {"redis_url": redis.url, "rate_limit": "100000/hour"}
        async with running(settings.model_copy(update=values), issuer) as api:
            up = api.state["rate_limits"].shared.up
            async with Load(issuer, transport=api.http._transport).running() as load:
                await up.wait()  # on a busy machine, Redis may have timed out already
                caplog.clear()
                redis.freeze() if is_frozen else redis.kill()
                await load.wait_for_responses(4 * CLIENTS)
                assert not up.is_set()
                await asyncio.to_thread(redis.thaw if is_frozen else redis.start)
                async with asyncio.timeout(PATIENCE):
                    await up.wait()
                await load.wait_for_responses(4 * CLIENTS)
    load.results.check(settings.database_url)
    assert load.results.failed == 0
    assert load.results.statuses.keys() == {200, 201}
    levels = [record.levelname for record in caplog.records if record.name == "backend.web.rate_limits_redis"]
    assert levels[:2] == ["WARNING", "INFO"]


@pytest.mark.full
async def test_known_keys_work_while_the_issuer_fails_and_new_ones_afterwards(settings: Settings) -> None:
    """The issuer hangs, fails and has a new key. Tokens of the new key get 503 until the key can be fetched."""
    issuer = LocalIssuer(ISSUER, audience=AUDIENCE)
    script: Script = says_json(issuer.jwks)

    async def answer(writer: asyncio.StreamWriter) -> None:
        await script(writer)

    async with serving(answer) as (url, _):  # noqa: SIM117  # the address is not known before
        async with running(settings.model_copy(update={"better_auth_jwks_url": url}), issuer) as api:

            async def request(token: str) -> httpx.Response:
                return await api.http.get(TASKS, headers={"Authorization": f"Bearer {token}"})

            async with Load(issuer, transport=api.http._transport).running() as load:
                await load.wait_for_responses(CLIENTS)
                issuer.rotate()
                new_token = issuer.token(sub="new")
                for failing in hangs, says("500 Internal Server Error"):
                    script = failing
                    refused: Any = await request(new_token)
                    assert (refused.status_code, refused.json()["code"]) == (503, "keys_unavailable")
                    assert int(refused.headers["retry-after"]) >= 1
                script = says_json(issuer.jwks)
                async with asyncio.timeout(PATIENCE):
                    while (response := await request(new_token)).status_code == 503:  # noqa: ASYNC110  # there is no event
                        await asyncio.sleep(float(response.headers["retry-after"]))
                assert response.status_code == 200
                await load.wait_for_responses(2 * CLIENTS)
    load.results.check(settings.database_url)
    assert load.results.failed == 0
    assert load.results.statuses.keys() == {200, 201}
