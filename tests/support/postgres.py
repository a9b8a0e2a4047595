"""A pytest plugin: a temporary PostgreSQL server for the test run, or the one that `TEST_DATABASE_URL` names."""

import os
from collections.abc import Iterator

import pytest

from backend.dev.postgres import EmbeddedPostgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The libpq URL of a superuser. Without `TEST_DATABASE_URL`, the server and its data are removed after the run."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    with EmbeddedPostgres(durable=False, max_connections=300) as server:
        yield server.url
