"""The typed client follows the real stream of changes, through all that ends one, and misses nothing."""

import asyncio
import itertools
import json
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest

from backend.auth.testing import LocalIssuer
from backend.dev.issuer import find_node
from backend.settings import Settings
from backend.users.security_events.schemas import EventType
from tests.auth.loopback import says_json
from tests.auth.loopback import serving as serving_keys
from tests.contract.packages import CLIENT
from tests.contract.serving import serving

TASKS = "/api/v1/tasks"
PATIENCE = 60  # seconds, on a machine that does much else


class Road:
    """An address that stays, on which the API can be reached: until it is cut, or closed."""

    def __init__(self) -> None:
        self.target = 0
        self.closed = False
        self._travelling: set[asyncio.StreamWriter] = set()

    async def open(self) -> "Road":
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def cut(self) -> None:
        """Whoever is on it is lost, in the middle of whatever it was."""
        for writer in self._travelling:
            writer.transport.abort()

    def close(self) -> None:
        self._server.close()
        self.cut()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closed:
            writer.transport.abort()
            return
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            self._travelling |= {writer, back}
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer))
            self._travelling -= {writer, back}
            return
        writer.transport.abort()

    @staticmethod
    async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()


class Follower:
    """The client's `changes`, in a process of its own, of one person."""

    def __init__(self, process: asyncio.subprocess.Process, tokens: Iterator[str]) -> None:
        self._process = process
        self._tokens = tokens
        self.answers: list[tuple[int, str | None]] = []
        """The status of each answer, with the Last-Event-ID that was sent."""

    async def next(self) -> dict[str, Any]:
        """The next change, or the error that ends it all."""
        while "status" in (said := await self._said()):
            pass
        return said

    async def answered(self, status: int) -> None:
        """Wait for such an answer; no change may come before it."""
        while self.answers[-1][0] != status:
            assert "status" in await self._said()

    async def _said(self) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        async with asyncio.timeout(PATIENCE):
            said: dict[str, Any] = json.loads(await self._process.stdout.readline())
        if "wants" in said:
            self._process.stdin.write(f"{next(self._tokens)}\n".encode())
            return await self._said()
        if "status" in said:
            self.answers.append((said["status"], said["since"]))
        return said


class System:
    """The API as it is deployed, a road to it, and an issuer that signs whatever a test wants."""

    def __init__(self, environment: Mapping[str, str], issuer: LocalIssuer, empty: Path, road: Road) -> None:
        self.issuer = issuer
        self.road = road
        self.database_url = environment["DATABASE_URL"]
        self._environment = environment
        self._empty = empty
        self._api = ExitStack()

    async def start(self) -> None:
        self.api = await asyncio.to_thread(self._api.enter_context, serving(self._empty, self._environment))
        self.road.target = int(self.api.rpartition(":")[2])

    async def stop(self) -> None:
        await asyncio.to_thread(self._api.close)

    async def call(self, sub: str, method: str, path: str, **body: Any) -> Any:
        """As this person, by another road."""
        headers = {"Authorization": f"Bearer {self.issuer.token(sub)}"}
        async with httpx.AsyncClient(base_url=self.api, headers=headers, timeout=PATIENCE) as http:
            response = (await http.request(method, path, json=body or None)).raise_for_status()
            return response.json() if response.content else None

    async def add(self, sub: str, title: str) -> str:
        made: str = (await self.call(sub, "POST", TASKS, title=title))["id"]
        return made

    async def tell(self, sub: str, event: EventType) -> None:
        content = self.issuer.security_event(sub, event.value, audience="http://localhost:8000/api/v1/security-events")
        headers = {"Content-Type": "application/secevent+jwt"}
        async with httpx.AsyncClient(timeout=PATIENCE) as http:
            (await http.post(f"{self.api}/api/v1/security-events", content=content, headers=headers)).raise_for_status()

    @asynccontextmanager
    async def following(self, sub: str, *tokens: str) -> AsyncIterator[Follower]:
        """From when it has begun. `tokens` are the first that it gets, others are made when it wants them."""
        fresh = (self.issuer.token(sub) for _ in itertools.repeat(None))
        process = await asyncio.create_subprocess_exec(
            find_node(),
            "--experimental-strip-types",
            "--disable-warning=ExperimentalWarning",
            "follow.ts",
            cwd=CLIENT / "tests",
            env={"API_URL": self.road.url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            follower = Follower(process, itertools.chain(tokens, fresh))
            assert await follower.next() == {"title": None}
            assert follower.answers == [(200, None)]
            yield follower
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


@pytest.fixture(scope="module")
async def system(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    issuer = LocalIssuer(f"http://{uuid4().hex}.test")
    async with serving_keys(says_json(issuer.jwks)) as (jwks_url, _):
        environment = {
            "DATABASE_URL": settings.database_url,
            "DATABASE_POOL_SIZE": "5",
            "BETTER_AUTH_URL": issuer.url,
            "BETTER_AUTH_JWKS_URL": jwks_url,
            "RATE_LIMIT": "off",
        }
        road = await Road().open()
        system = System(environment, issuer, tmp_path_factory.mktemp("empty"), road)
        await system.start()
        try:
            yield system
        finally:
            road.close()
            await system.stop()


@pytest.fixture
def ada() -> str:
    return uuid4().hex


async def test_what_happened_while_the_connection_was_lost_is_told(system: System, ada: str) -> None:
    async with system.following(ada) as follower:
        milk = await system.add(ada, "milk")
        seen = await follower.next()
        assert seen["title"] == "milk"
        system.road.closed = True
        system.road.cut()
        await system.add(ada, "bread")
        await system.call(ada, "DELETE", f"{TASKS}/{milk}")
        system.road.closed = False
        told = [await follower.next() for _ in range(2)]
        assert [(each["title"], each["gone"]) for each in told] == [("bread", False), ("milk", True)]
        # It said where it was, and was not told again what it knew.
        assert follower.answers[1:] == [(200, seen["token"])]


async def test_the_end_of_a_token_is_not_the_end(system: System, ada: str) -> None:
    """By the device's clock it would be good for longer: the API ends the stream, and its 401 gets a new one."""
    now = int(system.issuer.clock())
    async with system.following(ada, system.issuer.token(ada, iat=now - 200, exp=now)) as follower:
        await system.add(ada, "before")
        token = (await follower.next())["token"]
        await follower.answered(401)
        await system.add(ada, "meanwhile")
        assert (await follower.next())["title"] == "meanwhile"
        assert follower.answers[1:] == [(401, token), (200, token)]


async def test_a_session_that_was_revoked_is_not_the_end_where_there_is_another(system: System, ada: str) -> None:
    """Nor if the new token is of the very second of the revocation, and so no better."""
    tokens = system.issuer.token(ada), system.issuer.token(ada, sid="other")
    async with system.following(ada, *tokens) as follower:
        await system.tell(ada, EventType.session_revoked)
        await follower.answered(401)
        await system.add(ada, "meanwhile")
        assert (await follower.next())["title"] == "meanwhile"
        assert [status for status, _ in follower.answers][:3] == [200, 401, 401]
        assert follower.answers[-1][0] == 200


async def test_a_suspension_is_the_end(system: System, ada: str) -> None:
    async with system.following(ada) as follower:
        await system.tell(ada, EventType.account_disabled)
        assert await follower.next() == {"name": "ApiError", "code": "account_suspended"}


async def test_a_server_that_is_replaced_is_not_the_end(system: System, ada: str) -> None:
    async with system.following(ada) as follower:
        await system.add(ada, "before")
        token = (await follower.next())["token"]
        await system.stop()
        await system.start()
        await system.add(ada, "after")
        assert (await follower.next())["title"] == "after"
        assert follower.answers[-1] == (200, token)


async def test_what_cannot_be_told_any_more_is_to_be_read_anew(system: System, ada: str) -> None:
    async with system.following(ada) as follower:
        milk = await system.add(ada, "milk")
        token = (await follower.next())["token"]
        system.road.closed = True
        system.road.cut()
        await system.call(ada, "DELETE", f"{TASKS}/{milk}")
        async with await psycopg.AsyncConnection.connect(system.database_url) as connection:
            await connection.execute("UPDATE tasks SET deleted_at = now() - interval '31 days' WHERE id = %s", [milk])
        system.road.closed = False
        assert await follower.next() == {"title": None}
        await system.add(ada, "bread")
        assert (await follower.next())["title"] == "bread"
        assert follower.answers[1:] == [(410, token), (200, None)]
