"""Two machines that share PostgreSQL and Redis: rate limits, suspensions, restarts and the loss of a machine."""

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
        made = [Machine(tmp_path_factory.mktemp("machine"), values, host=host, inherits_socket=False) for host in HOSTS]
        await asyncio.gather(*(stack.enter_async_context(machine) for machine in made))
        yield made


class Balancer:
    """Chooses the machines in turn, among those whose last /readyz was 200."""

    def __init__(self, machines: list[Machine]) -> None:
        self._addresses = [machine.url for machine in machines]
        self._turns = count()
        self.ready: list[str] = []

    def address(self) -> str:
        return self.ready[next(self._turns) % len(self.ready)]

    @asynccontextmanager
    async def polling(self) -> AsyncIterator["Balancer"]:
        async with httpx.AsyncClient(trust_env=False, timeout=1) as http:
            await self._poll(http)
            job = asyncio.create_task(self._poll_forever(http))
            try:
                yield self
            finally:
                job.cancel()
                await asyncio.wait({job})

    async def _poll_forever(self, http: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(0.1)
            await self._poll(http)

    async def _poll(self, http: httpx.AsyncClient) -> None:
        async def is_ready(address: str) -> bool:
            try:
                return (await http.get(f"{address}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        found = await asyncio.gather(*map(is_ready, self._addresses))
        # If no machine is ready, try all of them.
        self.ready = [address for address, good in zip(self._addresses, found, strict=True) if good] or self._addresses


async def test_machines_share_the_rate_limit(machines: list[Machine], issuer: LocalIssuer) -> None:
    async def remaining(subject: str) -> list[str]:
        bearer = {"Authorization": f"Bearer {issuer.token(sub=subject)}"}
        async with httpx.AsyncClient(trust_env=False, headers=bearer, timeout=PATIENCE) as http:
            answers = [await http.get(machine.url + TASKS) for _ in range(5) for machine in machines]
        assert {answer.status_code for answer in answers} == {200}
        return [answer.headers["ratelimit"].split(";")[1] for answer in answers]

    shared = [f"r={QUOTA - number - 1}" for number in range(5 * len(machines))]
    # If Redis takes longer than 50 ms, as on a busy machine, a server counts alone for a second.
    async with asyncio.timeout(PATIENCE):
        for number in count():
            if await remaining(f"counted-{number}") == shared:
                break


async def test_every_machine_refuses_a_suspended_user(
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


@pytest.mark.full
async def test_a_rolling_restart_fails_no_request(
    machines: list[Machine], own_database: str, issuer: LocalIssuer
) -> None:
    """Behind a load balancer that polls /readyz ten times a second. Each machine has its own socket."""
    async with Balancer(machines).polling() as balancer, Load(issuer, balancer.address).running() as load:
        for machine in machines:
            machine.terminate()
            await machine.wait()
            await load.wait_for_responses(2 * CLIENTS)
            await machine.start()
            while machine.url not in balancer.ready:
                await load.wait_for_responses(1)
        await load.wait_for_responses(2 * CLIENTS)
    load.results.check(own_database)
    assert load.results.failed == 0, load.results
    assert load.results.statuses.keys() == {200, 201}, load.results


async def test_a_killed_machine_loses_no_acknowledged_write(
    machines: list[Machine], own_database: str, issuer: LocalIssuer
) -> None:
    """Its clients get no response until the balancer notices. A repeated Idempotency-Key is executed once."""
    lost = machines[0]
    async with Balancer(machines).polling() as balancer, Load(issuer, balancer.address, retry=True).running() as load:
        os.kill(lost.pid, signal.SIGKILL)
        await load.wait_until_healthy()
        assert balancer.ready == [machine.url for machine in machines if machine is not lost]
    load.results.check(own_database)
    assert load.results.statuses.keys() <= {200, 201, 409}, load.results
