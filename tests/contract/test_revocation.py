"""What Better Auth takes back is taken back here: in every process of the API, and through every outage."""

import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import anyio
import httpx
import pytest

from backend.dev.issuer import Issuer
from backend.dev.people import DEMO_PASSWORD, People, Refused, Session, no_cookies, session_of
from backend.settings import Settings
from tests.contract.serving import serving
from tests.contract.test_better_auth import newer_token_by_cookie
from tests.support.issuers import ADMIN

# How long each change took to reach both processes after Better Auth's answer: `--log-cli-level=INFO` shows it.
LOG = logging.getLogger(__name__)
PATIENCE = 30  # seconds, on a machine that does much else; a second is the promise
ME = "/api/v1/users/me"
TASKS = "/api/v1/tasks"
USERS = "/api/v1/admin/users"
PUBLIC_URL = "https://api.example.com"


@dataclass
class Deployment:
    """Two processes of the API on one database, and the issuer that tells the first of them."""

    issuer: Issuer
    people: People
    admin: Session
    http: httpx.AsyncClient
    serve: Callable[[int], tuple[ExitStack, str]]
    told: ExitStack
    addresses: tuple[str, str]

    async def as_admin(self, path: str, **body: object) -> None:
        await self.people.request("POST", path, self.admin.authorization, **body)

    async def somebody(self) -> tuple[str, Session]:
        email = f"{uuid4().hex}@example.com"
        return email, await self.people.sign_up(email)

    async def signed_in(self, email: str) -> Session | None:
        try:
            return await self.people.sign_in(email)
        except Refused as refused:
            if refused.code != "BANNED_USER":
                raise
            return None

    async def ask(self, address: str, token: str, path: str = ME) -> httpx.Response:
        return await self.http.get(f"{address}{path}", headers={"Authorization": f"Bearer {token}"})

    async def let_in(self, token: str) -> None:
        """Both know this person, and have them in their cache."""
        for address in self.addresses:
            assert (await self.ask(address, token)).status_code == 200

    async def reaches_both(self, what: str, seen: Callable[[str], Awaitable[bool]]) -> None:
        """Wait until both processes show it, each by itself."""
        began = time.perf_counter()

        async def reaches(address: str) -> None:
            while not await seen(address):  # noqa: ASYNC110  # another process changes: nothing tells of it here
                await anyio.sleep(0.005)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as both:
                for address in self.addresses:
                    both.start_soon(reaches, address)
        LOG.info("%s: %.0f ms", what, (time.perf_counter() - began) * 1000)

    async def refused(self, what: str, token: str, status: int, code: str, path: str = ME) -> None:
        shut: set[str] = set()

        async def seen(address: str) -> bool:
            response = await self.ask(address, token, path)
            if response.status_code == 200:
                assert address not in shut, "what was refused once is let in again"
                return False
            shut.add(address)
            # Whose account ends loses the sessions first, which is another refusal.
            return (response.status_code, response.json()["code"]) == (status, code)

        await self.reaches_both(what, seen)

    async def welcome(self, what: str, session: Session) -> None:
        """With a new token: the old ones ended with their sessions, and with them those of the same second."""

        async def seen(address: str) -> bool:
            return (await self.ask(address, await self.people.token(session))).status_code == 200

        await self.reaches_both(what, seen)

    def api_goes_down(self) -> None:
        self.told.close()

    def api_comes_back(self) -> None:
        self.told, _ = self.serve(0)


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture(scope="module")
def teller(ports: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(
        data_dir=tmp_path_factory.mktemp("issuer"),
        admin_emails=[ADMIN],
        cookie_cache=True,
        security_events=f"http://127.0.0.1:{ports[0]}/api/v1/security-events",
        security_events_audience=f"{PUBLIC_URL}/api/v1/security-events",
    ) as issuer:
        yield issuer


@pytest.fixture(scope="module")
async def deployment(
    teller: Issuer, ports: tuple[int, int], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Deployment]:
    empty: Path = tmp_path_factory.mktemp("empty")
    environment = {
        "DATABASE_URL": settings.database_url,
        "DATABASE_POOL_SIZE": "5",
        "BETTER_AUTH_URL": teller.url,
        "PUBLIC_URL": PUBLIC_URL,
        "RATE_LIMIT": "off",
    }
    with ExitStack() as everything:

        def serve(number: int) -> tuple[ExitStack, str]:
            process = everything.enter_context(ExitStack())
            return process, process.enter_context(serving(empty, environment, ports[number]))

        (told, first), (_, second) = serve(0), serve(1)
        async with (
            People(teller.base_url) as people,
            httpx.AsyncClient(cookies=no_cookies(), trust_env=False, timeout=PATIENCE) as http,
        ):
            admin = await people.sign_up(ADMIN)
            yield Deployment(teller, people, admin, http, serve, told, (first, second))


async def test_a_ban_and_its_end(deployment: Deployment) -> None:
    email, someone = await deployment.somebody()
    token = await deployment.people.token(someone)
    await deployment.let_in(token)
    await deployment.as_admin("/admin/ban-user", userId=someone.user_id)
    await deployment.refused("ban", token, 403, "account_suspended")
    await deployment.as_admin("/admin/unban-user", userId=someone.user_id)
    await deployment.welcome("unban", await deployment.people.sign_in(email))


async def test_a_ban_that_runs_out(deployment: Deployment) -> None:
    email, someone = await deployment.somebody()
    token = await deployment.people.token(someone)
    await deployment.let_in(token)
    await deployment.as_admin("/admin/ban-user", userId=someone.user_id, banExpiresIn=1)
    await deployment.refused("ban for a second", token, 403, "account_suspended")
    with anyio.fail_after(PATIENCE):
        while (again := await deployment.signed_in(email)) is None:  # noqa: ASYNC110  # a clock in another process
            await anyio.sleep(0.05)
    await deployment.welcome("the end of a ban", again)


async def test_signed_out_everywhere(deployment: Deployment) -> None:
    email, someone = await deployment.somebody()
    token = await deployment.people.token(someone)
    await deployment.let_in(token)
    await deployment.people.request("POST", "/revoke-sessions", someone.authorization)
    await deployment.refused("sign-out everywhere", token, 401, "invalid_token")
    await deployment.welcome("sign-in after it", await deployment.people.sign_in(email))


async def test_signed_out_on_one_device(deployment: Deployment) -> None:
    email, phone = await deployment.somebody()
    laptop = await deployment.people.sign_in(email)
    token = await deployment.people.token(phone)
    await deployment.let_in(token)
    await deployment.people.sign_out(phone)
    await deployment.refused("sign-out", token, 401, "invalid_token")
    await deployment.welcome("the other device", laptop)


async def test_a_role_given_and_taken(deployment: Deployment) -> None:
    _, someone = await deployment.somebody()
    user = await deployment.people.token(someone)
    await deployment.let_in(user)

    def has(roles: list[str], token: str) -> Callable[[str], Awaitable[bool]]:
        async def seen(address: str) -> bool:
            return bool((await deployment.ask(address, token)).json()["roles"] == roles)

        return seen

    await deployment.as_admin("/admin/set-role", userId=someone.user_id, role=["user", "admin"])
    await deployment.reaches_both("role given", has(["user", "admin"], user))
    administrator = await deployment.people.token(someone)
    await deployment.as_admin("/admin/set-role", userId=someone.user_id, role="user")
    await deployment.reaches_both("role taken", has(["user"], administrator))
    await deployment.reaches_both("role taken, and not brought back by an old token", has(["user"], user))


async def test_an_old_cookie_brings_no_role_back(deployment: Deployment) -> None:
    """With `session.cookieCache` the browser holds what was true minutes ago."""
    email, someone = await deployment.somebody()
    people = deployment.people
    await deployment.as_admin("/admin/set-role", userId=someone.user_id, role="admin")
    browser = await people.sign_in(email)
    administrator = await people.token_by_cookie(browser)
    for address in deployment.addresses:
        assert (await deployment.ask(address, administrator, USERS)).status_code == 200
    await deployment.as_admin("/admin/set-role", userId=someone.user_id, role="user")
    await deployment.refused("role taken", administrator, 403, "forbidden", USERS)
    cached = (await people.request("GET", "/get-session", browser.cookie)).json()
    assert cached["user"]["role"] == "admin", "else the cookie would show nothing"
    token = await newer_token_by_cookie(people, browser)
    for address in deployment.addresses:
        assert (await deployment.ask(address, token, USERS)).status_code == 403
        assert (await deployment.ask(address, token)).json()["roles"] == ["user"]


async def test_an_old_cookie_of_a_revoked_session_gets_no_token(deployment: Deployment) -> None:
    email, _ = await deployment.somebody()
    browser = await deployment.people.sign_in(email)
    assert await deployment.people.token_by_cookie(browser)
    await deployment.as_admin("/admin/revoke-user-sessions", userId=browser.user_id)
    assert (await deployment.people.request("GET", "/get-session", browser.cookie)).json()["session"]
    with pytest.raises(Refused, match="401"):
        await deployment.people.token_by_cookie(browser)


async def test_an_account_that_is_deleted(deployment: Deployment) -> None:
    _, someone = await deployment.somebody()
    token = await deployment.people.token(someone)
    await deployment.let_in(token)
    await deployment.people.request("POST", "/delete-user", someone.cookie, password=DEMO_PASSWORD)
    await deployment.refused("deletion", token, 403, "account_purged")


async def test_what_a_guest_made_is_there_after_the_sign_up(deployment: Deployment) -> None:
    guest = await deployment.people.sign_in_anonymously()
    token = await deployment.people.token(guest)
    await deployment.let_in(token)
    bearer = {"Authorization": f"Bearer {token}"}
    made = await deployment.http.post(f"{deployment.addresses[1]}{TASKS}", json={"title": "Buy milk"}, headers=bearer)
    assert made.status_code == 201, made.text
    body = {"email": f"{uuid4().hex}@example.com", "password": DEMO_PASSWORD, "name": "Ada"}
    signed_up = await deployment.people.request("POST", "/sign-up/email", guest.cookie, **body)
    new = await deployment.people.token(session_of(signed_up))

    async def seen(address: str) -> bool:
        return [task["title"] for task in (await deployment.ask(address, new, TASKS)).json()["items"]] == ["Buy milk"]

    await deployment.reaches_both("merge", seen)
    await deployment.refused("the guest's own token", token, 403, "account_purged")


async def test_nothing_is_missed_while_the_api_is_down_and_the_issuer_is_killed(deployment: Deployment) -> None:
    (_, banned), (_, removed) = await deployment.somebody(), await deployment.somebody()
    tokens = [await deployment.people.token(banned), await deployment.people.token(removed)]
    for token in tokens:
        await deployment.let_in(token)
    deployment.api_goes_down()
    await deployment.as_admin("/admin/ban-user", userId=banned.user_id)
    deployment.issuer.kill()
    deployment.issuer.start()
    await deployment.as_admin("/admin/remove-user", userId=removed.user_id)
    deployment.api_comes_back()
    await deployment.refused("ban before the API came back", tokens[0], 403, "account_suspended")
    await deployment.refused("deletion before the API came back", tokens[1], 403, "account_purged")
