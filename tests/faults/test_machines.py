"""Several machines on one PostgreSQL and one Redis: they limit and refuse together, and one may go at any time."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count

import httpx
import psycopg
import pytest

from backend.auth.testing import LocalIssuer
from tests.faults.load import CLIENTS, PATIENCE, TASKS, Load
from tests.faults.machine import Machine
from tests.support.redis_server import RedisServer, redis_server

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.needs("redis-server")

HOSTS = ("127.0.0.2", "127.0.0.3")
QUOTA = 100_000


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="module")
async def machines(
    environment: dict[str, str], redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[list[Machine]]:
    values = {**environment, "REDIS_URL": redis.url, "RATE_LIMIT": f"{QUOTA}/hour", "DRAIN_SECONDS": "1"}
    async with AsyncExitStack() as stack:
        made = [Machine(tmp_path_factory.mktemp("machine"), values, host=host, held=False) for host in HOSTS]
        await asyncio.gather(*(stack.enter_async_context(machine) for machine in made))
        yield made


class Balancer:
    """Sends each request to the next of those that said lately that they are ready, as any load balancer does."""

    def __init__(self, machines: list[Machine]) -> None:
        self._addresses = [machine.url for machine in machines]
        self._turns = count()
        self.ready: list[str] = []

    def address(self) -> str:
        return self.ready[next(self._turns) % len(self.ready)]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator["Balancer"]:
        async with httpx.AsyncClient(trust_env=False, timeout=1) as http:
            await self._look(http)
            job = asyncio.create_task(self._watch(http))
            try:
                yield self
            finally:
                job.cancel()
                await asyncio.wait({job})

    async def _watch(self, http: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(0.1)
            await self._look(http)

    async def _look(self, http: httpx.AsyncClient) -> None:
        async def is_ready(address: str) -> bool:
            try:
                return (await http.get(f"{address}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        found = await asyncio.gather(*map(is_ready, self._addresses))
        # Were nobody ready, it would be better to try than to refuse.
        self.ready = [address for address, good in zip(self._addresses, found, strict=True) if good] or self._addresses


async def test_machines_count_together(machines: list[Machine], issuer: LocalIssuer) -> None:
    bearer = {"Authorization": f"Bearer {issuer.token(sub='counted')}"}
    async with httpx.AsyncClient(trust_env=False, headers=bearer, timeout=PATIENCE) as http:
        for turn in range(1, 6):
            for number, machine in enumerate(machines):
                answer = await http.get(machine.url + TASKS)
                assert answer.status_code == 200
                left = QUOTA - (turn - 1) * len(machines) - number - 1
                assert f"r={left};" in answer.headers["ratelimit"]


async def test_every_machine_refuses_who_is_suspended(
    machines: list[Machine], own_database: str, issuer: LocalIssuer
) -> None:
    bearer = {"Authorization": f"Bearer {issuer.token(sub='suspended')}"}
    async with (
        asyncio.timeout(PATIENCE),
        httpx.AsyncClient(trust_env=False, headers=bearer, timeout=PATIENCE) as http,
        await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other,
    ):
        for machine in machines:
            assert (await http.get(machine.url + TASKS)).status_code == 200
        await other.execute("UPDATE users SET status = 'suspended' WHERE subject = 'suspended'")
        since = time.monotonic()
        for machine in machines:
            while (await http.get(machine.url + TASKS)).status_code != 403:
                pass
        logger.info("refused by %d machines within %.0f ms", len(machines), 1000 * (time.monotonic() - since))


async def test_machines_are_restarted_one_by_one(
    machines: list[Machine], own_database: str, issuer: LocalIssuer
) -> None:
    """Behind a load balancer that asks /readyz ten times a second; each closes its own socket."""
    async with Balancer(machines).watching() as balancer, Load(issuer, balancer.address).running() as load:
        for machine in machines:
            machine.terminate()
            await machine.ended()
            await load.answered(2 * CLIENTS)
            await machine.start()
            while machine.url not in balancer.ready:
                await load.answered(1)
        await load.answered(2 * CLIENTS)
    load.account.check(own_database)
    assert load.account.failed == 0, load.account
    assert load.account.statuses.keys() == {200, 201}, load.account


async def test_a_machine_is_lost(machines: list[Machine], own_database: str, issuer: LocalIssuer) -> None:
    """Its callers get no answer until the balancer has noticed; who asks again with the same key is served once."""
    lost = machines[0]
    async with Balancer(machines).watching() as balancer, Load(issuer, balancer.address, again=True).running() as load:
        os.kill(lost.pid, signal.SIGKILL)
        await load.healed()
        assert balancer.ready == [machine.url for machine in machines if machine is not lost]
    load.account.check(own_database)
    assert load.account.statuses.keys() <= {200, 201, 409}, load.account
