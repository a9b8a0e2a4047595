"""A ban takes effect in time despite other waiting events and a flood of forged ones."""

import asyncio
import logging
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from backend.auth.testing import LocalIssuer, SigningKey
from backend.dev.issuer import Issuer
from backend.dev.people import People, Session, no_cookies, session_of
from backend.settings import Settings
from tests.contract.serving import serving
from tests.support.issuers import ADMIN

LOG = logging.getLogger(__name__)
DEADLINE = 10.0  # seconds; about one is expected, and a ban behind the other events took 20 to 120
SIGN_OUTS = 1500
RATE_LIMIT = 100  # per minute; lower than the default, so that it is soon exhausted
EVENTS = "/api/v1/security-events"
NUMBERS = count()
ME = "/api/v1/users/me"
AUDIENCE = f"https://api.example.com{EVENTS}"
DISABLED = "https://schemas.openid.net/secevent/risc/event-type/account-disabled"


@dataclass
class Deployment:
    """The API in a separate process, and an issuer that sends it events."""

    issuer: Issuer
    people: People
    admin: Session
    http: httpx.AsyncClient
    address: str
    serve: Callable[[], ExitStack]
    process: ExitStack

    async def new_user(self) -> tuple[Session, str]:
        """A new user with a token that the API accepts."""
        session = await self.people.sign_up(f"{uuid4().hex}@example.com")
        token = await self.people.token(session)
        assert (await self.get(token)).status_code == 200
        return session, token

    async def get(self, token: str) -> httpx.Response:
        return await self.http.get(f"{self.address}{ME}", headers={"Authorization": f"Bearer {token}"})

    async def ban(self, session: Session) -> None:
        await self.people.request("POST", "/admin/ban-user", self.admin.authorization, userId=session.user_id)

    async def seconds_until_suspended(self, token: str) -> float:
        """Seconds until the API refuses the owner of the token as suspended."""
        began = time.perf_counter()
        async with asyncio.timeout(DEADLINE):
            while (answer := await self.get(token)).status_code != 403:  # noqa: ASYNC110 - set by another process
                await asyncio.sleep(0.05)  # the user has a quota
        assert answer.json()["code"] == "account_suspended"
        return time.perf_counter() - began


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found: int = listener.getsockname()[1]
    return found


@pytest.fixture(scope="module")
def sender(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(
        data_dir=tmp_path_factory.mktemp("issuer"),
        admin_emails=[ADMIN],
        security_events=f"http://127.0.0.1:{port}{EVENTS}",
        security_events_audience=AUDIENCE,
    ) as issuer:
        yield issuer


@pytest.fixture(scope="module")
async def deployment(
    sender: Issuer, port: int, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Deployment]:
    empty: Path = tmp_path_factory.mktemp("empty")
    environment = {
        "DATABASE_URL": settings.database_url,
        "BETTER_AUTH_URL": sender.url,
        "PUBLIC_URL": "https://api.example.com",
        "RATE_LIMIT": f"{RATE_LIMIT}/minute",
    }
    with ExitStack() as everything:

        def serve() -> ExitStack:
            process = everything.enter_context(ExitStack())
            process.enter_context(serving(empty, environment, port))
            return process

        process = serve()
        async with (
            People(sender.base_url) as people,
            httpx.AsyncClient(cookies=no_cookies(), trust_env=False, timeout=30) as http,
        ):
            admin = await people.sign_up(ADMIN)
            yield Deployment(sender, people, admin, http, f"http://127.0.0.1:{port}", serve, process)


def random_address() -> dict[str, str]:
    return {"X-Forwarded-For": f"203.0.113.{next(NUMBERS) % 256}"}


@asynccontextmanager
async def repeating(work: Callable[[], Awaitable[object]], *, times: int) -> AsyncIterator[None]:
    """Repeat the work in the background; the block starts after `times` repetitions."""
    enough = asyncio.Event()

    async def repeat() -> None:
        for number in count(1):
            await work()
            if number == times:
                enough.set()

    task = asyncio.create_task(repeat())
    waiting = asyncio.create_task(enough.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        yield
        assert not task.done(), "the background work failed"
    finally:
        task.cancel()
        waiting.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


async def test_a_ban_arrives_while_sign_outs_and_forged_events_exhaust_the_quotas(deployment: Deployment) -> None:
    user, token = await deployment.new_user()
    people, http = deployment.people, deployment.http
    (key,) = (await http.get(deployment.issuer.jwks_url)).json()["keys"]
    impostor = LocalIssuer(deployment.issuer.iss)
    statuses: Counter[int] = Counter()

    async def sign_out() -> None:
        answer = await people.request("POST", "/sign-in/anonymous", random_address())
        await people.request("POST", "/sign-out", session_of(answer).cookie | random_address())

    async def forge() -> None:
        event = impostor.security_event(
            "user1", DISABLED, key=SigningKey.generate("EdDSA", key["kid"]), audience=AUDIENCE
        )
        headers = {"Content-Type": "application/secevent+jwt"} | random_address()
        statuses[(await http.post(f"{deployment.address}{EVENTS}", content=event, headers=headers)).status_code] += 1

    async with repeating(sign_out, times=RATE_LIMIT + 20), repeating(forge, times=RATE_LIMIT + 20):
        await deployment.ban(user)
        LOG.info("a ban under load: %.2f s", await deployment.seconds_until_suspended(token))
    assert statuses.keys() <= {400, 429, 503}
    assert statuses[429]


async def test_a_ban_does_not_wait_for_sign_outs_queued_during_an_outage(deployment: Deployment) -> None:
    user, token = await deployment.new_user()
    deployment.process.close()
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    rows = [(uuid4().hex, f"guest-{uuid4().hex}", now) for _ in range(SIGN_OUTS)]
    with closing(sqlite3.connect(deployment.issuer.database, timeout=10)) as outbox, outbox:
        outbox.executemany(
            "INSERT INTO securityEvent (id, jti, type, userId, begunAt, toe, attempts, dueAt)"
            " VALUES (?1, ?1, 'session-revoked', ?2, ?3, ?3, 0, ?3)",
            rows,
        )
    await deployment.ban(user)
    deployment.serve()
    LOG.info("a ban after an outage: %.2f s", await deployment.seconds_until_suspended(token))
