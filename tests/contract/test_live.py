"""The typed client's stream of changes from a real API: interruptions lose no change."""

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
PATIENCE = 60  # seconds


class Proxy:
    """A TCP proxy in front of the API whose address stays the same when the API moves."""

    def __init__(self) -> None:
        self.target = 0
        self.closed = False
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self) -> "Proxy":
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def cut(self) -> None:
        """Abort all open connections."""
        for writer in self._open:
            writer.transport.abort()

    def close(self) -> None:
        self._server.close()
        self.cut()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closed:
            writer.transport.abort()
            return
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            self._open |= {writer, back}
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer))
            self._open -= {writer, back}
            return
        writer.transport.abort()

    @staticmethod
    async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()


class Stream:
    """The client's `changes` for one user, in a separate process."""

    def __init__(self, process: asyncio.subprocess.Process, tokens: Iterator[str]) -> None:
        self._process = process
        self._tokens = tokens
        self.responses: list[tuple[int, str | None]] = []
        """Each response's status, with the Last-Event-ID of its request."""

    async def next(self) -> dict[str, Any]:
        """The next change, or the error that ends the stream."""
        while "status" in (message := await self._read()):
            pass
        return message

    async def responded(self, status: int) -> None:
        """Wait for a response with this status; no change may arrive before it."""
        while self.responses[-1][0] != status:
            assert "status" in await self._read()

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        async with asyncio.timeout(PATIENCE):
            message: dict[str, Any] = json.loads(await self._process.stdout.readline())
        if "wants" in message:
            self._process.stdin.write(f"{next(self._tokens)}\n".encode())
            return await self._read()
        if "status" in message:
            self.responses.append((message["status"], message["since"]))
        return message


class System:
    """The API in a separate process, a proxy in front of it, and its issuer."""

    def __init__(self, environment: Mapping[str, str], issuer: LocalIssuer, empty: Path, proxy: Proxy) -> None:
        self.issuer = issuer
        self.proxy = proxy
        self.database_url = environment["DATABASE_URL"]
        self._environment = environment
        self._empty = empty
        self._api = ExitStack()

    async def start(self) -> None:
        self.api = await asyncio.to_thread(self._api.enter_context, serving(self._empty, self._environment))
        self.proxy.target = int(self.api.rpartition(":")[2])

    async def stop(self) -> None:
        await asyncio.to_thread(self._api.close)

    async def call(self, sub: str, method: str, path: str, **body: Any) -> Any:
        """Send a request of this user to the API directly, not through the proxy."""
        headers = {"Authorization": f"Bearer {self.issuer.token(sub)}"}
        async with httpx.AsyncClient(base_url=self.api, headers=headers, timeout=PATIENCE) as http:
            response = (await http.request(method, path, json=body or None)).raise_for_status()
            return response.json() if response.content else None

    async def add_task(self, sub: str, title: str) -> str:
        id: str = (await self.call(sub, "POST", TASKS, title=title))["id"]
        return id

    async def send_event(self, sub: str, event: EventType) -> None:
        content = self.issuer.security_event(sub, event.value, audience="http://localhost:8000/api/v1/security-events")
        headers = {"Content-Type": "application/secevent+jwt"}
        async with httpx.AsyncClient(timeout=PATIENCE) as http:
            (await http.post(f"{self.api}/api/v1/security-events", content=content, headers=headers)).raise_for_status()

    @asynccontextmanager
    async def streaming(self, sub: str, *tokens: str) -> AsyncIterator[Stream]:
        """Yield a stream after its first response. It uses `tokens` first, then new ones."""
        fresh = (self.issuer.token(sub) for _ in itertools.repeat(None))
        process = await asyncio.create_subprocess_exec(
            find_node(),
            "--experimental-strip-types",
            "--disable-warning=ExperimentalWarning",
            "follow.ts",
            cwd=CLIENT / "tests",
            env={"API_URL": self.proxy.url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            stream = Stream(process, itertools.chain(tokens, fresh))
            assert await stream.next() == {"title": None}
            assert stream.responses == [(200, None)]
            yield stream
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
        proxy = await Proxy().open()
        system = System(environment, issuer, tmp_path_factory.mktemp("empty"), proxy)
        await system.start()
        try:
            yield system
        finally:
            proxy.close()
            await system.stop()


@pytest.fixture
def ada() -> str:
    return uuid4().hex


async def test_changes_during_a_lost_connection_arrive_afterwards(system: System, ada: str) -> None:
    async with system.streaming(ada) as stream:
        milk = await system.add_task(ada, "milk")
        first = await stream.next()
        assert first["title"] == "milk"
        system.proxy.closed = True
        system.proxy.cut()
        await system.add_task(ada, "bread")
        await system.call(ada, "DELETE", f"{TASKS}/{milk}")
        system.proxy.closed = False
        changes = [await stream.next() for _ in range(2)]
        assert [(change["title"], change["gone"]) for change in changes] == [("bread", False), ("milk", True)]
        assert stream.responses[1:] == [(200, first["token"])]


@pytest.mark.full
async def test_the_stream_resumes_with_a_new_token_when_one_expires(system: System, ada: str) -> None:
    """With a slow clock, the client learns of the expiry from a 401."""
    now = int(system.issuer.clock())
    async with system.streaming(ada, system.issuer.token(ada, iat=now - 200, exp=now)) as stream:
        await system.add_task(ada, "before")
        token = (await stream.next())["token"]
        await stream.responded(401)
        await system.add_task(ada, "meanwhile")
        assert (await stream.next())["title"] == "meanwhile"
        assert stream.responses[1:] == [(401, token), (200, token)]


async def test_the_stream_resumes_with_the_token_of_another_session(system: System, ada: str) -> None:
    """A token issued within the second of the revocation is refused as well."""
    tokens = system.issuer.token(ada), system.issuer.token(ada, sid="other")
    async with system.streaming(ada, *tokens) as stream:
        await system.send_event(ada, EventType.session_revoked)
        await stream.responded(401)
        await system.add_task(ada, "meanwhile")
        assert (await stream.next())["title"] == "meanwhile"
        assert [status for status, _ in stream.responses][:3] == [200, 401, 401]
        assert stream.responses[-1][0] == 200


async def test_a_suspension_ends_the_stream_with_an_error(system: System, ada: str) -> None:
    async with system.streaming(ada) as stream:
        await system.send_event(ada, EventType.account_disabled)
        assert await stream.next() == {"name": "ApiError", "code": "account_suspended"}


async def test_the_stream_resumes_after_the_server_is_replaced(system: System, ada: str) -> None:
    async with system.streaming(ada) as stream:
        await system.add_task(ada, "before")
        token = (await stream.next())["token"]
        await system.stop()
        await system.start()
        await system.add_task(ada, "after")
        assert (await stream.next())["title"] == "after"
        assert stream.responses[-1] == (200, token)


@pytest.mark.full
async def test_an_expired_event_id_starts_the_stream_anew(system: System, ada: str) -> None:
    async with system.streaming(ada) as stream:
        milk = await system.add_task(ada, "milk")
        token = (await stream.next())["token"]
        system.proxy.closed = True
        system.proxy.cut()
        await system.call(ada, "DELETE", f"{TASKS}/{milk}")
        async with await psycopg.AsyncConnection.connect(system.database_url) as connection:
            await connection.execute("UPDATE tasks SET deleted_at = now() - interval '31 days' WHERE id = %s", [milk])
        system.proxy.closed = False
        assert await stream.next() == {"title": None}
        await system.add_task(ada, "bread")
        assert (await stream.next())["title"] == "bread"
        assert stream.responses[1:] == [(410, token), (200, None)]
