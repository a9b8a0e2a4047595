"""Keys of a real Better Auth server: rotation, a new database, a new secret, a rate limit."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

import jwt
import pytest

from backend.auth.testing import LocalIssuer
from backend.dev.issuer import Issuer
from backend.dev.people import People, Refused
from backend.settings import Settings
from tests.conftest import running
from tests.contract.test_better_auth import call, settings_for

StartIssuer = Callable[..., Issuer]


async def test_a_new_key_with_a_known_kid_replaces_the_old_one(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    """After the issuer's database is recreated, serial ids give its first key the kid "1" again."""
    better_auth = start_issuer(serial_ids=True)
    async with running(settings_for(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        old = await people.token(await people.sign_up("ada@example.com"))
        assert (await call(api, old)).status_code == 200
        better_auth.stop()
        better_auth.database.unlink()
        better_auth.start()
        new = await people.token(await people.sign_up("ada@example.com"))
        assert jwt.get_unverified_header(new)["kid"] == jwt.get_unverified_header(old)["kid"] == "1"
        assert (await call(api, new)).status_code == 200
        assert (await call(api, old)).status_code == 401


async def test_no_request_is_refused_during_rotations_and_old_tokens_stay_valid(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    better_auth = start_issuer()
    async with running(settings_for(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        session = await people.sign_up("ada@example.com")
        first = token = await people.token(session)
        statuses: list[int] = []
        served = asyncio.Semaphore(0)
        done = False

        async def client() -> None:
            while not done:
                statuses.append((await call(api, token)).status_code)
                served.release()
                await asyncio.sleep(0)  # a refused request may never yield to the loop

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for _ in range(2):
            better_auth.rotate()
            token = await people.token(session)
            for _ in range(50):
                await served.acquire()
        done = True
        await asyncio.gather(*clients)
        assert set(statuses) == {HTTPStatus.OK}
        assert len(api.state["keys"].status().kids) == 3
        assert (await call(api, first)).status_code == 200


async def test_tokens_stay_valid_after_a_change_of_the_secret(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    """The issuer can no longer decrypt its key and issues no tokens; those issued before stay valid."""
    better_auth = start_issuer(secret="a" * 32)
    async with running(settings_for(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        token = await people.token(await people.sign_up("ada@example.com"))
        assert (await call(api, token)).status_code == 200
        better_auth.stop()
        better_auth.secret = "b" * 32
        better_auth.start()
        with pytest.raises(Refused, match="500"):
            await people.token(await people.sign_in("ada@example.com"))
        assert (await call(api, token)).status_code == 200


async def test_an_issuer_with_a_rate_limit_gets_few_requests(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    better_auth = start_issuer(rate_limit=True)
    async with running(settings_for(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        token = await people.token(await people.sign_up("ada@example.com"))
        answers = await asyncio.gather(*(call(api, token) for _ in range(300)))
        assert {answer.status_code for answer in answers} == {200}
        assert sum(api.state["keys"].status().fetches.values()) <= 2
