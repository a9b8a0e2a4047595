"""Many concurrent first requests."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg

from backend import migrations
from backend.auth.testing import LocalIssuer
from tests.conftest import ISSUER, create_database
from tests.contract.serving import serving

PEOPLE = 10_000
AT_ONCE = 200
# A machine that does much else makes everybody wait for the database, past the seconds after which that is a 503.
PATIENT = """
from functools import partial
from backend import app, cli
app.Pool = partial(app.Pool, wait=300)
cli.main()
"""
ASK = "GET /api/v1/users/me HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n"
COUNT = "SELECT count(*), count(DISTINCT subject) FROM users"
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


async def arrive(address: str, tokens: Sequence[str]) -> list[tuple[int, str | None]]:
    """The status and user id of each response. Sends raw HTTP, so that the client is not the bottleneck."""
    waiting = iter(tokens)
    found: list[tuple[int, str | None]] = []
    server = urlsplit(address)

    async def client() -> None:
        reader, writer = await asyncio.open_connection(server.hostname, server.port)
        for token in waiting:
            writer.write(ASK.format(token).encode())
            status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            length = next(field.split(": ")[1] for field in fields if field.startswith("content-length: "))
            found.append((int(status.split()[1]), json.loads(await reader.readexactly(int(length))).get("id")))
        writer.close()

    async with asyncio.TaskGroup() as clients:
        for _ in range(AT_ONCE):
            clients.create_task(client())
    return found


async def test_ten_thousand_concurrent_users_get_one_row_each(
    postgres: str, issuer: LocalIssuer, jwks_url: str, tmp_path: Path
) -> None:
    """Every tenth user has two devices."""
    url = create_database(postgres, f"load_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    tokens = [issuer.token(sub=f"person {number}", name="Ada") for number in range(PEOPLE)]
    devices = [token for n, token in enumerate(tokens) for token in [token] * (1 + (n % 10 == 0))]
    environment = {
        "DATABASE_URL": url,
        "BETTER_AUTH_URL": ISSUER,
        "BETTER_AUTH_JWKS_URL": jwks_url,
        "RATE_LIMIT": "off",
    }
    with serving(tmp_path, environment, program=("-c", PATIENT)) as address:
        found = await arrive(address, devices)
    assert {status for status, _ in found} == {200}
    assert len(found) == PEOPLE * 11 // 10
    assert len({id for _, id in found}) == PEOPLE
    with psycopg.connect(url) as connection:
        assert connection.execute(COUNT).fetchone() == (PEOPLE, PEOPLE)
        assert connection.execute(DEADLOCKS).fetchone() == (0,)
