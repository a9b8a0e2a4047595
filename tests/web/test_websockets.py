"""WebSockets of a fork, over real sockets and through the protocol of `resource-server serve`."""

import asyncio
import io
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

from backend.auth.testing import LocalIssuer
from backend.operations.log_lines import configure_logging
from backend.settings import Settings
from backend.web import server
from backend.web.server import Protocol
from tests.conftest import Api, running
from tests.web.test_server import BIG_BODY, answer, connect, exchange, port_of, problem, server_of

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CLOSE = b"\x88\x80\0\0\0\0"  # an empty frame with the mask 0


def frame(text: str) -> bytes:
    """A text message of a client (RFC 6455, section 5.2), shorter than 126 bytes, with the mask 0."""
    return bytes([0x81, 0x80 | len(text)]) + bytes(4) + text.encode()


application = FastAPI()


@application.websocket("/ws")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        pass


async def routed(scope: Any, receive: Any, send: Any) -> None:
    await (application if scope["type"] == "websocket" else answer)(scope, receive, send)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with server_of(routed) as running:
        yield port_of(running)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, which gets its handlers and level back."""
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn.error")
    before = root.handlers[:], root.level, uvicorn.level
    yield root
    root.handlers[:], root.level, uvicorn.level = before


def server_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log lines of uvicorn and of its protocol."""
    return [each.getMessage() for each in caplog.records if each.name in ("uvicorn.error", "backend.web.server")]


async def check_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> None:
    writer.write(frame(text))
    assert await reader.readexactly(2 + len(text)) == bytes([0x81, len(text)]) + text.encode()


@pytest.mark.needs("websockets")
async def test_a_websocket_stays_open_after_the_deadlines_of_http(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer of the same length, started later, ends after all deadlines of the connection."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(server, "STALL_SECONDS", 0.1)
    reader, writer = await connect(port)
    writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    writer.write(HANDSHAKE)  # while the server waits for its client to read the response
    await reader.readexactly(BIG_BODY)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    for number in range(3):
        await check_echo(reader, writer, str(number))
        await asyncio.sleep(0.1)
    await check_echo(reader, writer, "open")
    writer.write(CLOSE)
    assert await reader.read() == b"\x88\0"
    writer.close()


@pytest.mark.needs("websockets")
@pytest.mark.parametrize("level", ["info", "debug"])
async def test_no_token_of_a_handshake_is_logged(
    port: int, root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    configure_logging(level, "json")
    assert len(root_logger.handlers) == 1
    reader, writer = await connect(port)
    writer.write(HANDSHAKE.replace(b"/ws", b"/ws?token=secret").replace(b"\r\n", b"\r\nX-Token: secret\r\n", 1))
    await reader.readuntil(b"\r\n\r\n")
    await check_echo(reader, writer, "secret")
    writer.close()
    assert '"WebSocket /ws\\" [accepted]' in stream.getvalue()
    assert "secret" not in stream.getvalue()


@pytest.mark.needs("websockets")
async def test_a_handshake_waits_for_earlier_responses(port: int) -> None:
    reader, writer = await connect(port)
    writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" + HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(BIG_BODY)
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()


async def test_without_a_library_a_handshake_is_a_501_with_one_log_line(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Protocol.connection_made

    def without_library(self: Protocol, transport: asyncio.Transport) -> None:
        self.ws_protocol_class = None
        made(self, transport)

    monkeypatch.setattr(Protocol, "connection_made", without_library)
    caplog.set_level(logging.INFO)
    assert problem(await exchange(port, HANDSHAKE)) == (501, "not_implemented")
    assert server_lines(caplog) == ["a WebSocket handshake was refused: install the extra `websockets`"]


async def handshake(api: Api, *headers: tuple[bytes, bytes]) -> Any:
    """The first message that the application sends for a handshake."""
    sent: asyncio.Queue[Any] = asyncio.Queue()
    incoming = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])

    async def receive() -> Any:
        return next(incoming)

    scope = {
        "type": "websocket",
        "path": "/ws",
        "query_string": b"",
        "headers": list(headers),
        "scheme": "ws",
        "client": ("127.0.0.1", 5),
        "extensions": {"websocket.http.response": {}},
        "state": dict(api.state),
    }
    await api.app(scope, receive, sent.put)
    return {**sent.get_nowait(), "scope": scope}


async def test_only_trusted_hosts_may_open_a_websocket(settings: Settings, issuer: LocalIssuer) -> None:
    config = settings.model_copy(update={"trusted_hosts": ("api.example.com",)})
    async with running(config, issuer, change=lambda app: app.add_api_websocket_route("/ws", echo)) as api:
        assert (await handshake(api, (b"host", b"api.example.com")))["type"] == "websocket.accept"
        assert (await handshake(api, (b"host", b"evil.example")))["status"] == 400


async def test_a_websocket_has_the_client_that_a_trusted_proxy_names(settings: Settings, issuer: LocalIssuer) -> None:
    config = settings.model_copy(update={"trusted_proxies": ("127.0.0.1",)})
    headers = ((b"x-forwarded-for", b"192.0.2.1"), (b"x-forwarded-proto", b"https"))
    async with running(config, issuer, change=lambda app: app.add_api_websocket_route("/ws", echo)) as api:
        scope = (await handshake(api, *headers))["scope"]
    assert (scope["client"], scope["scheme"]) == (("192.0.2.1", 0), "wss")


async def test_other_upgrades_are_ignored_without_a_log_line(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """As `curl --http2` sends them."""
    caplog.set_level(logging.INFO)
    reader, writer = await connect(port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n")
    assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
    assert server_lines(caplog) == []
    writer.close()
