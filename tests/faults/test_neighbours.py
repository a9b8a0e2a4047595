"""Redis and the issuer fail under load, and nobody whose key is known notices."""

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
@pytest.mark.parametrize("hanging", [False, True], ids=["killed", "frozen"])
async def test_redis_goes_and_comes_back(
    settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture, hanging: bool
) -> None:
    caplog.set_level(logging.INFO, "backend.web.rate_limits_redis")
    with redis_server() as redis:
        values = {"redis_url": redis.url, "rate_limit": "100000/hour"}
        async with running(settings.model_copy(update=values), issuer) as api:
            up = api.state["rate_limits"].shared.up
            async with Load(issuer, transport=api.http._transport).running() as load:
                await up.wait()  # a machine that is busy may have missed its turn already
                caplog.clear()
                redis.freeze() if hanging else redis.kill()
                await load.answered(4 * CLIENTS)
                assert not up.is_set()
                await asyncio.to_thread(redis.thaw if hanging else redis.start)
                async with asyncio.timeout(PATIENCE):
                    await up.wait()
                await load.answered(4 * CLIENTS)
    load.account.check(settings.database_url)
    assert load.account.failed == 0
    assert load.account.statuses.keys() == {200, 201}
    said = [record.levelname for record in caplog.records if record.name == "backend.web.rate_limits_redis"]
    assert said[:2] == ["WARNING", "INFO"]


async def test_the_issuer_hangs_fails_and_rotates(settings: Settings) -> None:
    """Whose key is known is served throughout. Whose is not is told to come back, and let in once it can be had."""
    issuer = LocalIssuer(ISSUER, audience=AUDIENCE)
    script: Script = says_json(issuer.jwks)

    async def answer(writer: asyncio.StreamWriter) -> None:
        await script(writer)

    async with serving(answer) as (url, _):  # noqa: SIM117  # the address is not known before
        async with running(settings.model_copy(update={"better_auth_jwks_url": url}), issuer) as api:

            async def ask(token: str) -> httpx.Response:
                return await api.http.get(TASKS, headers={"Authorization": f"Bearer {token}"})

            async with Load(issuer, transport=api.http._transport).running() as load:
                await load.answered(CLIENTS)
                issuer.rotate()
                newcomer = issuer.token(sub="newcomer")
                for failing in hangs, says("500 Internal Server Error"):
                    script = failing
                    refused: Any = await ask(newcomer)
                    assert (refused.status_code, refused.json()["code"]) == (503, "keys_unavailable")
                    assert int(refused.headers["retry-after"]) >= 1
                script = says_json(issuer.jwks)
                async with asyncio.timeout(PATIENCE):
                    while (let_in := await ask(newcomer)).status_code == 503:  # noqa: ASYNC110  # as it says
                        await asyncio.sleep(float(let_in.headers["retry-after"]))
                assert let_in.status_code == 200
                await load.answered(2 * CLIENTS)
    load.account.check(settings.database_url)
    assert load.account.failed == 0
    assert load.account.statuses.keys() == {200, 201}
