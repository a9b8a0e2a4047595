"""What really happens to a Better Auth server's keys, and that nobody is turned away wrongly meanwhile."""

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
from tests.contract.test_better_auth import call, served_by

StartIssuer = Callable[..., Issuer]


async def test_a_database_made_anew_reuses_a_key_id_for_another_key(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    """With serial ids every first key is "1". The new one is taken up; what the old one signed is refused at once."""
    better_auth = start_issuer(serial_ids=True)
    async with running(served_by(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        old = await people.token(await people.sign_up("ada@example.com"))
        assert (await call(api, old)).status_code == 200
        better_auth.stop()
        better_auth.database.unlink()
        better_auth.start()
        new = await people.token(await people.sign_up("ada@example.com"))
        assert jwt.get_unverified_header(new)["kid"] == jwt.get_unverified_header(old)["kid"] == "1"
        assert (await call(api, new)).status_code == 200
        assert (await call(api, old)).status_code == 401


async def test_a_rotation_under_traffic_turns_nobody_away(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    better_auth = start_issuer()
    async with running(served_by(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        session = await people.sign_up("ada@example.com")
        token = await people.token(session)
        statuses: list[int] = []
        served = asyncio.Semaphore(0)
        done = False

        async def client() -> None:
            while not done:
                statuses.append((await call(api, token)).status_code)
                served.release()
                await asyncio.sleep(0)  # a refusal comes without waiting for anything

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


async def test_after_the_secret_has_changed_the_signed_in_go_on(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    """The issuer cannot read its own key any more, and gives no new tokens; the ones there are stay good."""
    better_auth = start_issuer(secret="a" * 32)
    async with running(served_by(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        token = await people.token(await people.sign_up("ada@example.com"))
        assert (await call(api, token)).status_code == 200
        better_auth.stop()
        better_auth.secret = "b" * 32
        better_auth.start()
        with pytest.raises(Refused, match="500"):
            await people.token(await people.sign_in("ada@example.com"))
        assert (await call(api, token)).status_code == 200


async def test_an_issuer_that_limits_its_callers_is_not_pestered(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    better_auth = start_issuer(rate_limit=True)
    async with running(served_by(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        token = await people.token(await people.sign_up("ada@example.com"))
        answers = await asyncio.gather(*(call(api, token) for _ in range(300)))
        assert {answer.status_code for answer in answers} == {200}
        assert sum(api.state["keys"].status().fetches.values()) <= 2


async def test_with_the_cookie_cache_a_banned_user_gets_no_token(
    start_issuer: StartIssuer, settings: Settings, issuer: LocalIssuer
) -> None:
    """Better Auth still accepts the cookie; the token is made from its storage."""
    better_auth = start_issuer(cookie_cache=True, admin_emails=["admin@example.com"])
    async with running(served_by(better_auth, settings), issuer) as api, People(better_auth.base_url) as people:
        admin, eve = await people.sign_up("admin@example.com"), await people.sign_up("eve@example.com")
        assert (await call(api, await people.token_by_cookie(eve))).status_code == 200
        await people.request("POST", "/admin/ban-user", admin.authorization, userId=eve.user_id)
        with pytest.raises(Refused, match="401 UNAUTHORIZED"):
            await people.token_by_cookie(eve)
