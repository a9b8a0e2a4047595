"""Live updates over sockets: several workers, and a client that stalls."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from backend.sync import broker
from backend.sync.broker import MAX_CACHED, Broker
from backend.web import server
from backend.web.server import Protocol
from tests.conftest import Api
from tests.support.following import PATIENCE, TASKS, reading
from tests.support.workers import Server, two_workers
from tests.web.test_server import serving


async def events_of(answer: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """The fields of each event of a stream."""
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            yield fields
            fields = {}


def worker_of(server: Server, answer: httpx.Response) -> int:
    """The process id of the worker that serves the response's connection."""
    _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
    for worker in server.workers():
        if any(connection.raddr and connection.raddr.port == port for connection in worker.net_connections("tcp")):
            pid: int = worker.pid
            return pid
    raise AssertionError("no worker has this connection")


async def test_streams_receive_changes_of_all_workers_and_end_at_shutdown(
    api: Api, database_url: str, jwks_url: str
) -> None:
    ada = api.person()
    with two_workers(database_url, jwks_url) as server:
        async with (
            httpx.AsyncClient(base_url=server.address, headers=ada.bearer, timeout=PATIENCE, trust_env=False) as http,
            AsyncExitStack() as stack,
        ):
            readers: dict[int, AsyncIterator[dict[str, str]]] = {}
            while len(readers) < 2:
                opened = AsyncExitStack()
                answer = await opened.enter_async_context(http.stream("GET", f"{TASKS}/events"))
                assert answer.status_code == 200
                if (worker := worker_of(server, answer)) in readers:
                    await opened.aclose()
                    continue
                await stack.enter_async_context(opened)
                readers[worker] = events_of(answer)
                assert "retry" in await anext(readers[worker])
            made = [(await http.post(TASKS, json={"title": title})).json() for title in "ab"]
            for reader in readers.values():
                assert [json.loads((await anext(reader))["data"]) for _ in made] == made
            server.process.terminate()
            for reader in readers.values():
                assert await anext(reader) == {"event": "end", "data": '{"reason": "shutdown"}'}
                assert [fields async for fields in reader] == []
        assert server.process.wait(PATIENCE) == 0


TITLE = re.compile(rb'"title":"(\d+)"')


async def test_a_client_that_stalls_is_disconnected_and_can_resume(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker keeps a limited amount of unsent data for it, however much is written meanwhile."""
    page, text = 10, "x" * 10_000
    bound = 64 * 1024 + max(MAX_CACHED, page * 2 * len(text))  # uvicorn's buffer, and the next message
    monkeypatch.setattr(broker, "PAGE", page)
    stalled: list[Protocol] = []
    watch_client = Protocol._watch_client
    original_made, original_lost = Protocol.connection_made, Protocol.connection_lost
    disconnected = asyncio.Event()

    def connection_made(self: Protocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        original_made(self, transport)

    def connection_lost(self: Protocol, error: Exception | None) -> None:
        original_lost(self, error)
        disconnected.set()

    monkeypatch.setattr(Protocol, "connection_made", connection_made)
    monkeypatch.setattr(Protocol, "connection_lost", connection_lost)
    monkeypatch.setattr(Protocol, "_watch_client", lambda self: stalled.append(self))
    ada, updates = api.person(), api.state["broker"]
    assert isinstance(updates, Broker)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(3 * PATIENCE):
        async for port in serving(api.http._transport.app):  # type: ignore[attr-defined]  # of httpx.ASGITransport
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", port))
                head = f"GET {TASKS}/events HTTP/1.0\r\nAuthorization: {ada.bearer['Authorization']}\r\n\r\n"
                await loop.sock_sendall(client, head.encode())
                received = b""
                while b"id: " not in received.partition(b"\r\n\r\n")[2]:
                    received += await loop.sock_recv(client, 1000)
                titles = [f"{number}" for number in range(200)]
                for first in range(0, len(titles), 50):
                    tasks = [{"title": title, "description": text} for title in titles[first : first + 50]]
                    operations = [{"op": "create", "task": task} for task in tasks]
                    answer = await ada.post(f"{TASKS}/batch", {"operations": operations})
                    assert answer.status_code == 200
                while not stalled:  # noqa: ASYNC110  # there is no event
                    await asyncio.sleep(0)
                for _ in range(5):  # time for the broker, which would write more if there were no bound
                    await ada.get(TASKS)
                waiting = stalled[-1].transport.get_write_buffer_size()
                assert 0 < waiting <= bound < len(titles) * len(text) / 4
                assert len(updates) == 1
                monkeypatch.setattr(server, "STALL_SECONDS", 0.05)
                monkeypatch.setattr(Protocol, "_watch_client", watch_client)
                watch_client(stalled[-1])
                await disconnected.wait()
                while len(updates):  # noqa: ASYNC110  # there is no event
                    await asyncio.sleep(0)
                try:
                    while piece := await loop.sock_recv(client, 100_000):
                        received += piece
                except ConnectionResetError:
                    pass
    *events, _ = received.partition(b"\r\n\r\n")[2].split(b"\n\n")
    last = re.findall(rb"^id: (\S+)$", events[-1], re.MULTILINE)[0].decode()
    seen = [title.decode() for event in events for title in TITLE.findall(event)]
    assert len(seen) < len(titles)
    async with reading(api, ada, last) as reader:
        seen += [(await reader.next()).data["title"] for _ in range(len(titles) - len(seen))]
        assert sorted(seen, key=int) == titles
        newest = await ada.task("newest")
        assert (await reader.next()).data == newest
