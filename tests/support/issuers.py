"""A pytest plugin: Better Auth servers that all tests share, and servers of single tests."""

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
    """A running issuer that all tests share. A test creates its own users, and changes neither keys nor process."""
    with Issuer(admin_emails=[ADMIN]) as issuer:
        yield issuer


@pytest.fixture(scope="session")
async def people(better_auth: Issuer) -> AsyncIterator[People]:
    """A client that signs up users at the shared issuer."""
    async with People(better_auth.base_url) as people:
        yield people


@pytest.fixture(scope="session")
async def admin(people: People) -> Session:
    """A session of the administrator of the shared issuer."""
    try:
        return await people.sign_up(ADMIN)
    except Refused:
        return await people.sign_in(ADMIN)


@pytest.fixture(scope="session")
def better_auth_oauth() -> Iterator[Issuer]:
    """A running OAuth provider that all tests share."""
    with Issuer(oauth=True, admin_emails=[ADMIN]) as issuer:
        yield issuer


@pytest.fixture(scope="session")
async def oauth(better_auth_oauth: Issuer) -> AsyncIterator[OAuthClient]:
    """The OAuth client that is registered at the shared OAuth provider."""
    async with OAuthClient(better_auth_oauth.base_url, **better_auth_oauth.client) as client:
        yield client


@pytest.fixture
def start_issuer(tmp_path: Path) -> Iterator[Callable[..., Issuer]]:
    """A function that starts an issuer with the options of `Issuer`. The issuers end with the test."""
    with ExitStack() as stack:

        def start(**options: object) -> Issuer:
            issuer = Issuer(**{"data_dir": tmp_path / "issuer"} | options)  # type: ignore[arg-type]  # passed on as given
            stack.callback(issuer.close)
            issuer.start()
            return issuer

        yield start
