"""Fixtures of the fault tests: a database per module, and the environment of a server that uses it."""

from uuid import uuid4

import pytest

from backend import migrations
from tests.conftest import ISSUER, create_database


@pytest.fixture(scope="module")
def own_database(postgres: str) -> str:
    """A migrated database that only the tests of the module use."""
    url = create_database(postgres, f"faults_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    return url


@pytest.fixture(scope="module")
def environment(own_database: str, jwks_url: str) -> dict[str, str]:
    return {
        "DATABASE_URL": own_database,
        "BETTER_AUTH_URL": ISSUER,
        "BETTER_AUTH_JWKS_URL": jwks_url,
        "DATABASE_POOL_SIZE": "5",
        "DRAIN_SECONDS": "0.5",
        "RATE_LIMIT": "off",
        "LOG_LEVEL": "info",
    }
