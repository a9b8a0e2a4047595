"""A pytest plugin: real Better Auth servers, one shared by the whole run, others to order."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from backend.dev.issuer import Issuer
from backend.dev.oauth import OAuthClient
from backend.dev.people import People, Refused, Session

ADMIN = "admin@example.com"


@pytest.fixture(scope="session")
def better_auth() -> Iterator[Issuer]:
    """A running issuer that everybody shares: bring your own people, and leave its keys and its process alone."""
    with Issuer(admin_emails=[ADMIN]) as issuer:
        yield issuer


@pytest.fixture(scope="session")
async def people(better_auth: Issuer) -> AsyncIterator[People]:
    """The people of the shared issuer."""
    async with People(better_auth.base_url) as people:
        yield people


@pytest.fixture(scope="session")
async def admin(people: People) -> Session:
    """The session of an administrator of the shared issuer."""
    try:
        return await people.sign_up(ADMIN)
    except Refused:
        return await people.sign_in(ADMIN)


@pytest.fixture(scope="session")
def better_auth_oauth() -> Iterator[Issuer]:
    """A running OAuth provider that everybody shares."""
    with Issuer(oauth=True, admin_emails=[ADMIN]) as issuer:
        yield issuer


@pytest.fixture(scope="session")
async def oauth(better_auth_oauth: Issuer) -> AsyncIterator[OAuthClient]:
    """The client of the shared OAuth provider."""
    async with OAuthClient(better_auth_oauth.base_url, **better_auth_oauth.client) as client:
        yield client


@pytest.fixture
def start_issuer(tmp_path: Path) -> Iterator[Callable[..., Issuer]]:
    """Start an issuer of the test's own, with the options of `Issuer`; all of them end with the test."""
    with ExitStack() as stack:

        def start(**options: object) -> Issuer:
            issuer = Issuer(**{"data_dir": tmp_path / "issuer"} | options)  # type: ignore[arg-type]  # passed on as given
            stack.callback(issuer.close)
            issuer.start()
            return issuer

        yield start
