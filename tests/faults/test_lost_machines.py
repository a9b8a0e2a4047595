"""A client machine disappears without closing its connections: PostgreSQL releases its locks."""

import asyncio
import logging
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from backend import migrations
from backend.database import SYSTEM, Database, Pool, Transaction
from backend.dev.postgres import EmbeddedPostgres
from tests.conftest import create_database
from tests.database.test_executor import raw
from tests.support.programs import Network, network
from tests.support.relay import Relay

logger = logging.getLogger(__name__)

MAX_SECONDS = 15.0  # until the locks are released
SLACK = 5.0  # seconds, for a busy machine

# Programs for the lost machine, with the advisory lock that each holds. A program prints a line and then sleeps.
TRANSACTION = """
    async def work(transaction):
        await transaction.rows(Statement(text("SELECT pg_advisory_xact_lock(1)")))
        await held()

    await Database(pool, SYSTEM).transact(work)
"""
# No time limit ends an idle session: PostgreSQL notices the loss only by TCP keepalives.
SESSION = """
    async with pool.connection() as connection:
        await connection.execute("SELECT pg_advisory_lock(2)")
        await held()
"""
MIGRATION = """
    connection = migrations._open(sys.argv[1])
    connection.execute("SELECT pg_advisory_xact_lock(3)")
    await held()
"""
PROGRAMS = {1: TRANSACTION, 2: SESSION, 3: MIGRATION}
PROGRAM = """
import asyncio
import sys

from sqlalchemy import text

from backend import migrations
from backend.database import SYSTEM, Database, Pool, Statement


async def held():
    print("held", flush=True)
    await asyncio.sleep(600)


async def main():
  async with Pool(sys.argv[1], size=5, deadline=600) as pool:
{}

asyncio.run(main())
"""


async def seconds_until_released(url: str, key: int) -> float:
    """How long another session waits for an advisory lock."""
    since = time.monotonic()
    async with await psycopg.AsyncConnection.connect(url) as other:
        await other.execute(f"SET lock_timeout = {round(1000 * (MAX_SECONDS + SLACK))}".encode())
        await other.execute("SELECT pg_advisory_xact_lock(%s)", (key,))
    return time.monotonic() - since


async def test_a_silent_client_loses_its_open_transaction(own_database: str) -> None:
    """Its host acknowledges TCP packets, as a pooler does. Only the time limit of idle transactions ends it."""
    is_locked = asyncio.Event()

    async def work(transaction: Transaction) -> None:
        await transaction.rows(raw("SELECT pg_advisory_xact_lock(4)"))
        is_locked.set()
        await asyncio.Event().wait()

    async with Relay(own_database) as relay, Pool(relay.url, size=5, deadline=600) as pool:
        transaction = asyncio.create_task(Database(pool, SYSTEM).transact(work))
        await is_locked.wait()
        relay.hang()
        try:
            assert await seconds_until_released(own_database, 4) < MAX_SECONDS
        finally:
            relay.drop()
            transaction.cancel()
            await asyncio.wait({transaction})


class RemoteDatabase(NamedTuple):
    """A migrated database, with its URL on this machine and on the other one."""

    network: Network
    here: str
    there: str


@pytest.fixture(scope="module")
def remote_database() -> Iterator[RemoteDatabase]:
    with tempfile.TemporaryDirectory() as name, network() as net:
        place = Path(name)
        place.chmod(0o711)  # as root, PostgreSQL runs as another user
        hba = place / "pg_hba.conf"
        hba.write_text(f"local all all trust\nhost all all {net.there}/32 trust\n")
        hba.chmod(0o644)
        options = {"fsync": "off", "listen_addresses": net.here, "hba_file": str(hba)}
        with EmbeddedPostgres(place / "data", settings=options) as server:
            url = create_database(server.url, "api")
            migrations.upgrade(url)
            address = {"host": net.here, "port": "5432"}
            yield RemoteDatabase(net, url, f"postgresql://?{urlencode({**conninfo_to_dict(url), **address})}")


@pytest.mark.needs("netns")
async def test_a_machine_that_loses_power_loses_its_locks(remote_database: RemoteDatabase) -> None:
    """The locks of a transaction, a session and a migration."""
    network = remote_database.network
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for program in PROGRAMS.values():
            script = PROGRAM.format(textwrap.indent(textwrap.dedent(program), " " * 4))
            command = network.command(sys.executable, "-c", script, remote_database.there)
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))  # noqa: ASYNC220  # as quick as a fork
        for process in processes:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"held\n"
        network.cut()
        waited = await asyncio.gather(*(seconds_until_released(remote_database.here, key) for key in PROGRAMS))
    finally:
        for process in processes:
            process.kill()
            await asyncio.to_thread(process.communicate)
        network.mend()
    logger.info("the locks were released after %s s", ", ".join(f"{seconds:.1f}" for seconds in waited))
    assert max(waited) < MAX_SECONDS
