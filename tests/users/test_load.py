"""First requests of many concurrent users, over a running server."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest

from backend import migrations
from backend.auth.testing import LocalIssuer
from tests.conftest import ISSUER, create_database
from tests.contract.serving import serving

CONNECTIONS = 200
# On a busy machine, requests could wait for the database longer than the limit after which they are a 503.
WITHOUT_LIMIT = """
from functools import partial
from backend import app, cli
app.Pool = partial(app.Pool, wait=300)
cli.main()
"""
REQUEST = "GET /api/v1/users/me HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n"
COUNT = "SELECT count(*), count(DISTINCT subject) FROM users"
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


async def send_all(address: str, tokens: Sequence[str]) -> list[tuple[int, str | None]]:
    """The status and user id of each response. Sends raw HTTP, so that the client is not the bottleneck."""
    waiting = iter(tokens)
    responses: list[tuple[int, str | None]] = []
    server = urlsplit(address)

    async def client() -> None:
        reader, writer = await asyncio.open_connection(server.hostname, server.port)
        for token in waiting:
            writer.write(REQUEST.format(token).encode())
            status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            length = next(field.split(": ")[1] for field in fields if field.startswith("content-length: "))
            responses.append((int(status.split()[1]), json.loads(await reader.readexactly(int(length))).get("id")))
        writer.close()

    async with asyncio.TaskGroup() as clients:
        for _ in range(CONNECTIONS):
            clients.create_task(client())
    return responses


@pytest.mark.parametrize("users", [1_000, pytest.param(10_000, marks=pytest.mark.full)])
async def test_concurrent_first_requests_create_one_row_per_user(
    postgres: str, issuer: LocalIssuer, jwks_url: str, tmp_path: Path, users: int
) -> None:
    """Every tenth user has two devices."""
    url = create_database(postgres, f"load_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    tokens = [issuer.token(sub=f"user {number}", name="Ada") for number in range(users)]
    devices = [token for n, token in enumerate(tokens) for token in [token] * (1 + (n % 10 == 0))]
    environment = {
        "DATABASE_URL": url,
        "BETTER_AUTH_URL": ISSUER,
        "BETTER_AUTH_JWKS_URL": jwks_url,
        "RATE_LIMIT": "off",
    }
    with serving(tmp_path, environment, program=("-c", WITHOUT_LIMIT)) as address:
        responses = await send_all(address, devices)
    assert {status for status, _ in responses} == {200}
    assert len(responses) == len(devices) == users * 11 // 10
    assert len({id for _, id in responses}) == users
    with psycopg.connect(url) as connection:
        assert connection.execute(COUNT).fetchone() == (users, users)
        assert connection.execute(DEADLOCKS).fetchone() == (0,)
