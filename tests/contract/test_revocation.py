"""Bans, sign-outs, roles and deletions at Better Auth reach every process of the API, also after an outage."""

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

# Logs how long each change took to reach both processes; shown by `--log-cli-level=INFO`.
LOG = logging.getLogger(__name__)
PATIENCE = 30  # seconds; about one is expected on an idle machine
ME = "/api/v1/users/me"
TASKS = "/api/v1/tasks"
USERS = "/api/v1/admin/users"
PUBLIC_URL = "https://api.example.com"


@dataclass
class Deployment:
    """Two processes of the API on one database, and an issuer that sends its events to the first."""

    issuer: Issuer
    people: People
    admin: Session
    http: httpx.AsyncClient
    serve: Callable[[int], tuple[ExitStack, str]]
    first_process: ExitStack
    addresses: tuple[str, str]

    async def as_admin(self, path: str, **body: object) -> None:
        await self.people.request("POST", path, self.admin.authorization, **body)

    async def new_user(self) -> tuple[str, Session]:
        email = f"{uuid4().hex}@example.com"
        return email, await self.people.sign_up(email)

    async def signed_in(self, email: str) -> Session | None:
        try:
            return await self.people.sign_in(email)
        except Refused as error:
            if error.code != "BANNED_USER":
                raise
            return None

    async def get(self, address: str, token: str, path: str = ME) -> httpx.Response:
        return await self.http.get(f"{address}{path}", headers={"Authorization": f"Bearer {token}"})

    async def expect_accepted(self, token: str) -> None:
        """Assert that both processes accept the token, and so have the user in their caches."""
        for address in self.addresses:
            assert (await self.get(address, token)).status_code == 200

    async def wait_for_both(self, what: str, arrived: Callable[[str], Awaitable[bool]]) -> None:
        """Wait until the change has arrived in both processes."""
        began = time.perf_counter()

        async def reaches(address: str) -> None:
            while not await arrived(address):  # noqa: ASYNC110  # the change is in another process
                await anyio.sleep(0.005)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as both:
                for address in self.addresses:
                    both.start_soon(reaches, address)
        LOG.info("%s: %.0f ms", what, (time.perf_counter() - began) * 1000)

    async def wait_until_refused(self, what: str, token: str, status: int, code: str, path: str = ME) -> None:
        refusing: set[str] = set()

        async def arrived(address: str) -> bool:
            response = await self.get(address, token, path)
            if response.status_code == 200:
                assert address not in refusing, "expect_accepted again after a refusal"
                return False
            refusing.add(address)
            # Before the deletion of an account, its sessions end, with another code.
            return (response.status_code, response.json()["code"]) == (status, code)

        await self.wait_for_both(what, arrived)

    async def wait_until_accepted(self, what: str, session: Session) -> None:
        """With a new token: those issued in the second of the revocation are wait_until_refused as well."""

        async def arrived(address: str) -> bool:
            return (await self.get(address, await self.people.token(session))).status_code == 200

        await self.wait_for_both(what, arrived)

    def stop_api(self) -> None:
        self.first_process.close()

    def start_api(self) -> None:
        self.first_process, _ = self.serve(0)


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture(scope="module")
def sender(ports: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
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
    sender: Issuer, ports: tuple[int, int], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Deployment]:
    empty: Path = tmp_path_factory.mktemp("empty")
    environment = {
        "DATABASE_URL": settings.database_url,
        "DATABASE_POOL_SIZE": "5",
        "BETTER_AUTH_URL": sender.url,
        "PUBLIC_URL": PUBLIC_URL,
        "RATE_LIMIT": "off",
    }
    with ExitStack() as everything:

        def serve(number: int) -> tuple[ExitStack, str]:
            process = everything.enter_context(ExitStack())
            return process, process.enter_context(serving(empty, environment, ports[number]))

        (first_process, first), (_, second) = serve(0), serve(1)
        async with (
            People(sender.base_url) as people,
            httpx.AsyncClient(cookies=no_cookies(), trust_env=False, timeout=PATIENCE) as http,
        ):
            admin = await people.sign_up(ADMIN)
            yield Deployment(sender, people, admin, http, serve, first_process, (first, second))


async def test_a_ban_and_its_end_reach_every_process(deployment: Deployment) -> None:
    email, user = await deployment.new_user()
    token = await deployment.people.token(user)
    await deployment.expect_accepted(token)
    await deployment.as_admin("/admin/ban-user", userId=user.user_id)
    await deployment.wait_until_refused("ban", token, 403, "account_suspended")
    await deployment.as_admin("/admin/unban-user", userId=user.user_id)
    await deployment.wait_until_accepted("unban", await deployment.people.sign_in(email))


async def test_a_ban_ends_when_it_expires(deployment: Deployment) -> None:
    email, user = await deployment.new_user()
    token = await deployment.people.token(user)
    await deployment.expect_accepted(token)
    await deployment.as_admin("/admin/ban-user", userId=user.user_id, banExpiresIn=1)
    await deployment.wait_until_refused("ban for a second", token, 403, "account_suspended")
    with anyio.fail_after(PATIENCE):
        while (again := await deployment.signed_in(email)) is None:  # noqa: ASYNC110  # the clock of another process
            await anyio.sleep(0.05)
    await deployment.wait_until_accepted("the end of a ban", again)


async def test_a_sign_out_everywhere_revokes_all_tokens(deployment: Deployment) -> None:
    email, user = await deployment.new_user()
    token = await deployment.people.token(user)
    await deployment.expect_accepted(token)
    await deployment.people.request("POST", "/revoke-sessions", user.authorization)
    await deployment.wait_until_refused("sign-out everywhere", token, 401, "invalid_token")
    await deployment.wait_until_accepted("sign-in after it", await deployment.people.sign_in(email))


async def test_a_sign_out_on_one_device_keeps_the_others_signed_in(deployment: Deployment) -> None:
    email, phone = await deployment.new_user()
    laptop = await deployment.people.sign_in(email)
    token = await deployment.people.token(phone)
    await deployment.expect_accepted(token)
    await deployment.people.sign_out(phone)
    await deployment.wait_until_refused("sign-out", token, 401, "invalid_token")
    await deployment.wait_until_accepted("the other device", laptop)


async def test_a_removed_role_is_not_restored_by_an_older_token(deployment: Deployment) -> None:
    _, user = await deployment.new_user()
    token = await deployment.people.token(user)
    await deployment.expect_accepted(token)

    def has(roles: list[str], token: str) -> Callable[[str], Awaitable[bool]]:
        async def arrived(address: str) -> bool:
            return bool((await deployment.get(address, token)).json()["roles"] == roles)

        return arrived

    await deployment.as_admin("/admin/set-role", userId=user.user_id, role=["user", "admin"])
    await deployment.wait_for_both("role given", has(["user", "admin"], token))
    administrator = await deployment.people.token(user)
    await deployment.as_admin("/admin/set-role", userId=user.user_id, role="user")
    await deployment.wait_for_both("role removed", has(["user"], administrator))
    await deployment.wait_for_both("role still removed with an older token", has(["user"], token))


async def test_a_cached_cookie_does_not_restore_a_removed_role(deployment: Deployment) -> None:
    """With `session.cookieCache`, the browser's cookie contains the user as it was minutes ago."""
    email, user = await deployment.new_user()
    people = deployment.people
    await deployment.as_admin("/admin/set-role", userId=user.user_id, role="admin")
    browser = await people.sign_in(email)
    administrator = await people.token_by_cookie(browser)
    for address in deployment.addresses:
        assert (await deployment.get(address, administrator, USERS)).status_code == 200
    await deployment.as_admin("/admin/set-role", userId=user.user_id, role="user")
    await deployment.wait_until_refused("role removed", administrator, 403, "forbidden", USERS)
    cached = (await people.request("GET", "/get-session", browser.cookie)).json()
    assert cached["user"]["role"] == "admin", "otherwise this test would prove nothing"
    token = await newer_token_by_cookie(people, browser)
    for address in deployment.addresses:
        assert (await deployment.get(address, token, USERS)).status_code == 403
        assert (await deployment.get(address, token)).json()["roles"] == ["user"]


async def test_a_cached_cookie_of_a_revoked_session_gets_no_token(deployment: Deployment) -> None:
    email, _ = await deployment.new_user()
    browser = await deployment.people.sign_in(email)
    assert await deployment.people.token_by_cookie(browser)
    await deployment.as_admin("/admin/revoke-user-sessions", userId=browser.user_id)
    assert (await deployment.people.request("GET", "/get-session", browser.cookie)).json()["session"]
    with pytest.raises(Refused, match="401"):
        await deployment.people.token_by_cookie(browser)


async def test_a_deleted_account_is_refused(deployment: Deployment) -> None:
    _, user = await deployment.new_user()
    token = await deployment.people.token(user)
    await deployment.expect_accepted(token)
    await deployment.people.request("POST", "/delete-user", user.cookie, password=DEMO_PASSWORD)
    await deployment.wait_until_refused("deletion", token, 403, "account_purged")


async def test_tasks_of_an_anonymous_user_are_kept_after_sign_up(deployment: Deployment) -> None:
    guest = await deployment.people.sign_in_anonymously()
    token = await deployment.people.token(guest)
    await deployment.expect_accepted(token)
    bearer = {"Authorization": f"Bearer {token}"}
    made = await deployment.http.post(f"{deployment.addresses[1]}{TASKS}", json={"title": "Buy milk"}, headers=bearer)
    assert made.status_code == 201, made.text
    body = {"email": f"{uuid4().hex}@example.com", "password": DEMO_PASSWORD, "name": "Ada"}
    signed_up = await deployment.people.request("POST", "/sign-up/email", guest.cookie, **body)
    new = await deployment.people.token(session_of(signed_up))

    async def arrived(address: str) -> bool:
        return [task["title"] for task in (await deployment.get(address, new, TASKS)).json()["items"]] == ["Buy milk"]

    await deployment.wait_for_both("merge", arrived)
    await deployment.wait_until_refused("the guest's own token", token, 403, "account_purged")


async def test_bans_and_deletions_during_an_outage_of_the_api_arrive_afterwards(deployment: Deployment) -> None:
    (_, banned), (_, removed) = await deployment.new_user(), await deployment.new_user()
    tokens = [await deployment.people.token(banned), await deployment.people.token(removed)]
    for token in tokens:
        await deployment.expect_accepted(token)
    deployment.stop_api()
    await deployment.as_admin("/admin/ban-user", userId=banned.user_id)
    deployment.issuer.kill()
    deployment.issuer.start()
    await deployment.as_admin("/admin/remove-user", userId=removed.user_id)
    deployment.start_api()
    await deployment.wait_until_refused("ban before the API came back", tokens[0], 403, "account_suspended")
    await deployment.wait_until_refused("deletion before the API came back", tokens[1], 403, "account_purged")
