"""A machine is gone without a word, as one that lost its power: PostgreSQL gives back the locks that it held."""

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

MOST = 15.0  # seconds until its locks are free
SLACK = 5.0  # for a machine that is busy with other things
KEY = 8
LOCK = f"SELECT pg_advisory_xact_lock({KEY})"

# What runs on the machine that is lost. Each prints a line when it holds the lock, and then does nothing.
IDLE_IN_TRANSACTION = """
    async def work(transaction):
        await transaction.rows(Statement(text("SELECT pg_advisory_xact_lock(8)")))
        await held()

    await Database(pool, SYSTEM).transact(work)
"""
# No limit of time ends such a session: only TCP tells that its client is gone.
IDLE = """
    async with pool.connection() as connection:
        await connection.execute("SELECT pg_advisory_lock(8)")
        await held()
"""
MIGRATING = """
    connection = migrations._open(sys.argv[1])
    connection.execute("SELECT pg_advisory_xact_lock(8)")
    await held()
"""
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


async def seconds_until_free(url: str) -> float:
    """How long another session waits for the lock."""
    since = time.monotonic()
    async with await psycopg.AsyncConnection.connect(url) as other:
        await other.execute(f"SET lock_timeout = {round(1000 * (MOST + SLACK))}".encode())
        await other.execute(LOCK.encode())
    return time.monotonic() - since


async def test_a_client_that_says_nothing_more_loses_its_transaction(own_database: str) -> None:
    """Its host answers for TCP, so nothing but the limit of idle transactions ends it: a pooler may be such a host."""
    holds = asyncio.Event()

    async def work(transaction: Transaction) -> None:
        await transaction.rows(raw(LOCK))
        holds.set()
        await asyncio.Event().wait()

    async with Relay(own_database) as relay, Pool(relay.url, size=5, deadline=600) as pool:
        begun = asyncio.create_task(Database(pool, SYSTEM).transact(work))
        await holds.wait()
        relay.hang()
        try:
            assert await seconds_until_free(own_database) < MOST
        finally:
            relay.drop()
            begun.cancel()
            await asyncio.wait({begun})


class Far(NamedTuple):
    """A migrated database, its URL here, and its URL on the other machine."""

    network: Network
    here: str
    there: str


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    with tempfile.TemporaryDirectory() as name, network() as net:
        place = Path(name)
        place.chmod(0o711)  # as root, PostgreSQL runs as somebody else
        hba = place / "pg_hba.conf"
        hba.write_text(f"local all all trust\nhost all all {net.there}/32 trust\n")
        hba.chmod(0o644)
        options = {"fsync": "off", "listen_addresses": net.here, "hba_file": str(hba)}
        with EmbeddedPostgres(place / "data", settings=options) as server:
            url = create_database(server.url, "api")
            migrations.upgrade(url)
            address = {"host": net.here, "port": "5432"}
            yield Far(net, url, f"postgresql://?{urlencode({**conninfo_to_dict(url), **address})}")


@pytest.mark.needs("netns")
@pytest.mark.parametrize("program", [IDLE_IN_TRANSACTION, IDLE, MIGRATING], ids=["transaction", "session", "migration"])
async def test_a_machine_that_loses_its_power_loses_its_locks(far: Far, program: str) -> None:
    script = PROGRAM.format(textwrap.indent(textwrap.dedent(program), " " * 4))
    command = far.network.command(sys.executable, "-c", script, far.there)
    process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: ASYNC220  # as quick as a fork
    assert process.stdout is not None
    try:
        assert await asyncio.to_thread(process.stdout.readline) == b"held\n"
        far.network.cut()
        waited = await seconds_until_free(far.here)
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)
        far.network.mend()
    logger.info("the locks were free after %.1f s", waited)
    assert waited < MOST
