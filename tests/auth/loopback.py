"""HTTP servers on loopback sockets with scripted responses, most of them broken."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

BOMB = gzip.compress(b" " * 50_000_000, 1)
Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Run `script` for each connection after its request was read; yields the URL and the list of requests."""
    requests: list[bytes] = []
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            await script(writer)
        except (ConnectionError, EOFError, asyncio.CancelledError):  # EOFError: the client sent no request
            pass
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}/jwks", requests
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


def says(status: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Script:
    """Send a complete response; `headers` may contain a wrong Content-Length."""

    async def respond(writer: asyncio.StreamWriter) -> None:
        writer.write(_head(status, {"Content-Length": str(len(body)), **(headers or {})}) + body)
        await writer.drain()

    return respond


def says_json(value: Any) -> Script:
    return says("200 OK", json.dumps(value).encode())


async def hangs(_: asyncio.StreamWriter) -> None:
    """Never respond."""
    await asyncio.Event().wait()


async def drips(writer: asyncio.StreamWriter) -> None:
    """Send the body byte by byte, so that no timeout between two reads expires."""
    writer.write(_head("200 OK", {"Content-Length": "1000000"}))
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def floods(writer: asyncio.StreamWriter) -> None:
    """Send 50 MB without a Content-Length."""
    writer.write(_head("200 OK", {"Transfer-Encoding": "chunked"}))
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    for _ in range(800):
        writer.write(chunk)
        await writer.drain()
    writer.write(b"0\r\n\r\n")


async def crumbles(writer: asyncio.StreamWriter) -> None:
    """Send 100 kB in chunks of one byte, all at once."""
    writer.write(_head("200 OK", {"Transfer-Encoding": "chunked"}) + b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n")
    await writer.drain()


async def bombs(writer: asyncio.StreamWriter) -> None:
    """Send 50 kB that decompress to 50 MB, although only identity is accepted."""
    await says("200 OK", BOMB, {"Content-Encoding": "gzip"})(writer)


async def hangs_up(writer: asyncio.StreamWriter) -> None:
    """Close the connection in the middle of the body."""
    await says("200 OK", b'{"keys": [', {"Content-Length": "1000"})(writer)


def _head(status: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "Connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
