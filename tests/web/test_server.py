"""The HTTP server over real sockets: limits on slow clients, long heads and bodies, and connections."""

import asyncio
import json
import logging
import re
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.web import server
from backend.web.connection_limit import max_connections
from backend.web.response_cycle import Cycle
from backend.web.server import MAX_HEAD, MAX_TRAILERS, MAX_UNREAD, PIECE, Protocol
from tests.conftest import running

BIG_BODY = 20_000_000


async def answer(scope: Scope, _: Receive, send: Send) -> None:
    """Respond to `/` without reading the body, and to `/big` with more than any buffer holds."""
    size = BIG_BODY if scope["path"] == "/big" else 2
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * size if size == BIG_BODY else b"ok"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async for port in serving(answer):
        yield port


async def serving(app: Any) -> AsyncIterator[int]:
    async with server_of(app) as server:
        yield port_of(server)


@asynccontextmanager
async def server_of(app: Any) -> AsyncIterator[uvicorn.Server]:
    config = uvicorn.Config(app, port=0, http=Protocol, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server
    finally:
        await server.shutdown()


def port_of(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(port: int) -> Connection:
    return await asyncio.open_connection("127.0.0.1", port, limit=2**20)


async def exchange(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send the data and read the response until the server closes the connection."""
    reader, writer = await connect(port)
    writer.write(data)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *fields = head.decode().split("\r\n")
    headers = dict(field.lower().split(": ", 1) for field in fields)
    return int(first.split()[1]), headers, body


async def ended(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def problem(response: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    status, headers, body = response
    assert headers["content-type"] == "application/problem+json"
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    document = json.loads(body)
    assert document.keys() == {"type", "title", "status", "detail", "code", "request_id"}
    assert document["status"] == status
    return status, document["code"]


async def test_requests_in_pieces_are_answered_on_one_connection(port: int) -> None:
    reader, writer = await connect(port)
    for _ in range(3):
        for piece in b"GET / HT", b"TP/1.1\r\nHost: x\r", b"\n\r\n":
            writer.write(piece)
            await writer.drain()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(2) == b"ok"
    long = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000
    writer.write(long + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).count(b"HTTP/1.1 200") == 2
    writer.close()


class RecordingTransport:
    """Records what is written to a transport."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self._transport.write(data)


async def test_a_complete_response_is_sent_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part of a streamed response is sent at once."""
    transports: list[RecordingTransport] = []
    connection_made, seen = Protocol.connection_made, asyncio.Event()

    def record_connection(self: Protocol, transport: asyncio.Transport) -> None:
        transports.append(RecordingTransport(transport))
        connection_made(self, cast("asyncio.Transport", transports[-1]))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            await receive()
        headers = [(b"content-length", b"2")] if scope["path"] == "/whole" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"] == "/fails":
            raise RuntimeError("on purpose")
        if headers:
            await send({"type": "http.response.body", "body": b"ok"})
            return
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await seen.wait()
        await send({"type": "http.response.body", "body": b"second"})

    monkeypatch.setattr(Protocol, "connection_made", record_connection)
    async with server_of(app) as server, asyncio.timeout(20):
        reader, writer = await connect(port_of(server))
        (written,) = [transport.written for transport in transports]
        go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"POST /whole HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == go_on
        writer.write(b"x")
        whole = await reader.readuntil(b"\r\n\r\nok")
        assert written == [go_on, whole]
        # Two pipelined requests, the first of which gets a head only.
        writer.write(b"HEAD /whole HTTP/1.1\r\nHost: x\r\n\r\nGET /whole HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == whole.removesuffix(b"ok")
        assert await reader.readuntil(b"ok") == whole
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\nfirst\r\n")).startswith(b"HTTP/1.1 200"), "sent before the second part"
        seen.set()
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"GET /fails HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read() == b"", "the started response is aborted"
        writer.close()


PLAIN: dict[str, Any] = {"length": [("content-length", "2")], "method": "GET", "status": 200, "keep_alive": True}
NAMES = st.sampled_from(["x", "content-length", "Content-Length", "connection", "transfer-encoding", "a b", "x:", ""])
VALUES = st.sampled_from(
    ["", "2", "0", "two", "close", "keep-alive", "chunked", "a\tb", "é", "a\r\nx: y", "a\0", "\x7f"]
)


@given(
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=3),
    length=st.sampled_from([[], [("content-length", "2")]]),
    body=st.sampled_from([b"", b"ok", b"okay"]),
    method=st.sampled_from(["GET", "HEAD"]),
    status=st.sampled_from([200, 204, 304, 404]),
    keep_alive=st.booleans(),
)
@example(headers=[("content-length", "0")], body=b"", **PLAIN)
@example(headers=[("content-length", "1")], body=b"ok", **PLAIN)
@example(headers=[("x", "a\r\nx: y")], body=b"ok", **PLAIN)
@example(headers=[("connection", "close")], body=b"ok", **PLAIN)
@example(headers=[], body=b"ok", **PLAIN | {"method": "HEAD"})
@example(headers=[], body=b"ok", **PLAIN | {"keep_alive": False})
@example(headers=[], body=b"okay", **PLAIN)
@settings(max_examples=500, deadline=None)
async def test_responses_are_the_bytes_that_uvicorn_sends(
    headers: list[tuple[str, str]],
    length: list[tuple[str, str]],
    body: bytes,
    method: str,
    status: int,
    keep_alive: bool,
) -> None:
    async def sent(cycle_class: type[RequestResponseCycle]) -> tuple[bytes, type[Exception] | None, bool, bool]:
        written: list[bytes] = []
        transport = SimpleNamespace(write=written.append, close=lambda: written.append(b" closed"))
        logger, ended = logging.getLogger("none"), asyncio.Event()
        cycle = cycle_class(
            cast("Any", {"method": method}),
            cast("asyncio.Transport", transport),
            FlowControl(cast("asyncio.Transport", transport)),
            logger,
            logger,
            access_log=False,
            default_headers=[(b"date", b"today")],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=keep_alive,
            on_response=ended.set,
        )
        fields = [(name.encode(), value.encode()) for name, value in length + headers]
        error: type[Exception] | None = None
        try:
            await cycle.send({"type": "http.response.start", "status": status, "headers": fields})
            with pytest.raises(RuntimeError):  # a second start has no effect
                await cycle.send({"type": "http.response.start", "status": 500, "headers": []})
            await cycle.send({"type": "http.response.body", "body": body})
        except (RuntimeError, ValueError) as raised:
            error = type(raised)
        return b"".join(written), error, ended.is_set(), cycle.response_complete

    assert await sent(Cycle) == await sent(RequestResponseCycle)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2 * MAX_HEAD,
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: x\r\n" * (MAX_HEAD // 2) + b"\r\n",
        b"GET /" + b"x" * 2 * MAX_HEAD,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /" + b"x" * 2 * MAX_HEAD,
    ],
    ids=["endless field", "long field", "many fields", "endless path", "second request"],
)
async def test_a_head_over_the_limit_is_refused(port: int, data: bytes) -> None:
    status, headers, body = await exchange(port, data)
    if status == 200:  # the first request was valid
        head, _, body = body.removeprefix(b"ok").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431")
        assert json.loads(body)["code"] == "headers_too_large"
    else:
        assert problem((status, headers, body)) == (431, "headers_too_large")


def head_of(length: int) -> bytes:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    fields = b"X: x\r\n" * 5_000
    last = length - len(head + fields) - len(b"Y: \r\n\r\n")
    return head + fields + b"Y: " + b"y" * last + b"\r\n\r\n"


@pytest.mark.parametrize("size", [None, 1_000, 1], ids=["whole", "in pieces", "byte by byte"])
@pytest.mark.parametrize(("length", "status"), [(MAX_HEAD, 200), (MAX_HEAD + 1, 431)])
async def test_the_limit_of_a_head_does_not_depend_on_its_pieces(
    length: int, status: int, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = head_of(length)
    assert len(data) == length
    async with server_of(answer) as server:
        if size is None:
            assert (await exchange(port_of(server), data))[0] == status
            return
        received = Protocol.data_received

        def in_pieces(self: Protocol, data: bytes) -> None:
            for start in range(0, len(data), size):
                received(self, data[start : start + size])

        monkeypatch.setattr(Protocol, "data_received", in_pieces)
        assert (await exchange(port_of(server), data))[0] == status


async def test_the_limit_of_a_head_excludes_the_body_before_it(port: int) -> None:
    data = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2_000 + head_of(MAX_HEAD)
    status, _, body = await exchange(port, data)
    assert status == 200
    assert body.startswith(b"okHTTP/1.1 200")


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
FORGED = b"Authorization: forged\r\nX-Forwarded-For: 192.0.2.1\r\nExpect: 100-continue\r\nConnection: upgrade\r\n"
FLOOD = 64 * 1024 * 1024


class Reader:
    """An application that reads each body to its end and records headers and body."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[tuple[bytes, bytes]], bytes]] = []
        self.disconnects = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                self.seen.append((list(scope["headers"]), body))
                await answer(scope, receive, send)
                return
        self.disconnects += 1


@pytest.mark.parametrize("size", [FLOOD, 1], ids=["whole", "byte by byte"])
async def test_trailer_fields_do_not_become_headers(size: int) -> None:
    """Neither headers of their own request nor of the next one."""
    app = Reader()
    expecting = CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n"
    bodies = [b"3\r\nabc\r\n0\r\n" + FORGED + b"\r\n", b"2;x=y\r\nde\r\n00\r\n" + FORGED + b"\r\n"]
    data = CHUNKED + bodies[0] + expecting + bodies[1] + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with server_of(app) as server, asyncio.timeout(20):
        reader, writer = await connect(port_of(server))
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        responses = await reader.read()
        writer.close()
    assert responses.count(b"HTTP/1.1 200") == 3
    headers = [(b"host", b"x"), (b"transfer-encoding", b"chunked")]
    assert app.seen == [
        (headers, b"abc"),
        ([*headers, (b"expect", b"100-continue")], b"de"),
        ([(b"host", b"x"), (b"connection", b"close")], b""),
    ]


@pytest.mark.parametrize(("length", "status"), [(MAX_TRAILERS, 200), (MAX_TRAILERS + 2, 431)])
async def test_trailer_fields_are_limited(port: int, length: int, status: int) -> None:
    field = b"X: " + b"x" * (length - len(b"X: \r\n")) + b"\r\n"
    data = CHUNKED + b"3\r\nabc\r\n0\r\n" + field + b"\r\n"
    closing = CHUNKED.replace(b"Host: x", b"Host: x\r\nConnection: close") + data.removeprefix(CHUNKED)
    reader, writer = await connect(port)
    writer.write(data)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 %d" % status)
    if status == 200:  # the next request has the same limit
        writer.write(closing)
        assert (await reader.read()).startswith(b"okHTTP/1.1 200")
    writer.close()


@contextmanager
def limited_memory() -> Iterator[None]:
    """Assert that the block never uses more than 4 MiB."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()


async def flood(connection: Connection, start: bytes, more: bytes) -> tuple[int, bytes]:
    """Send `more` repeatedly until the server closes the connection; return the bytes sent and the response."""
    reader, writer = connection
    answered = asyncio.create_task(ended(reader))
    block, sent = more * max(1, 65_536 // len(more)), 0
    writer.write(start)
    with suppress(ConnectionError):
        while not answered.done() and sent < FLOOD and tracemalloc.get_traced_memory()[1] < FLOOD / 8:
            writer.write(block)
            await writer.drain()
            await asyncio.sleep(0)
            sent += len(block)
    writer.transport.abort()
    return sent, await answered


endless_metadata = pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"3\r\nabc\r\n0\r\nX: ", b"x"),
        (b"3\r\nabc\r\n0\r\n", b"x"),
        (b"3\r\nabc\r\n0\r\n", b"X: x\r\n"),
        (b"3\r\nabc\r\n0\r\nX: ", b" "),
        (b"3;", b"x"),
        (b"", b"0"),
        (b"", b"1;" + b"x" * 50 + b"\r\nx\r\n"),
    ],
    ids=["value", "name", "fields", "spaces", "extension", "zeros", "extensions"],
)


@endless_metadata
async def test_chunk_extensions_and_trailers_are_limited(start: bytes, more: bytes) -> None:
    app = Reader()
    async with server_of(app) as server, asyncio.timeout(60):
        with limited_memory():
            sent, answered = await flood(await connect(port_of(server)), CHUNKED + start, more)
        assert sent < FLOOD / 4
        head, _, body = answered.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431")
        assert json.loads(body)["code"] == "headers_too_large"
        assert (app.seen, app.disconnects) == ([], 1)


@endless_metadata
async def test_chunk_extensions_and_trailers_are_limited_after_the_response(
    port: int, start: bytes, more: bytes
) -> None:
    reader, writer = await connect(port)
    writer.write(CHUNKED)
    await reader.readuntil(b"ok")
    async with asyncio.timeout(60):
        with limited_memory():
            sent, answered = await flood((reader, writer), start, more)
    assert sent < FLOOD / 4
    assert answered == b""


async def test_a_started_response_is_aborted_when_the_trailers_exceed_the_limit() -> None:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] == "http.request":
            pass

    async with server_of(app) as server, asyncio.timeout(20):
        reader, writer = await connect(port_of(server))
        writer.write(CHUNKED)
        begun = await reader.readuntil(b"first\r\n")
        assert begun.startswith(b"HTTP/1.1 200")
        writer.write(b"0\r\n" + b"X: x\r\n" * MAX_TRAILERS)
        assert await ended(reader) == b""
        writer.close()


async def test_an_unread_body_is_limited(port: int) -> None:
    reader, writer = await connect(port)
    for _ in range(2):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % MAX_UNREAD)
        await reader.readuntil(b"ok")
        writer.write(b"x" * MAX_UNREAD)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (2 * FLOOD))
    await reader.readuntil(b"ok")
    sent, answered = await flood((reader, writer), b"", b"x" * 65_536)
    assert sent < FLOOD / 2
    assert answered == b""


async def test_pipelined_requests_are_answered_with_bounded_buffers() -> None:
    """The server holds at most one parsed piece of them, and one unparsed read."""
    waiting = unparsed = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal waiting, unparsed
        await receive()
        (connection,) = cast("set[Any]", pipelined.server_state.connections)
        waiting, unparsed = max(waiting, len(connection.pipeline)), max(unparsed, len(connection._unparsed))
        await answer(scope, receive, send)

    request = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 275 + b"\r\n\r\n"
    assert len(request) == 307
    async with server_of(app) as pipelined, asyncio.timeout(60):
        reader, writer = await connect(port_of(pipelined))
        writer.write(request * 3_999 + request.replace(b"X: xxxxxxxxxxxxxxxxx", b"Connection: close\r\nX:"))
        responses = await reader.read()
        writer.close()
    assert responses.count(b"HTTP/1.1 200") == responses.count(b"HTTP/1.1 ") == 4_000
    assert 0 < waiting <= PIECE // len(request) + 1
    assert 0 < unparsed <= 2**18


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"HELO\r\n\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /" + b"x" * 2 * MAX_HEAD, 431),
        (CHUNKED + b"0\r\n" + b"X: x\r\n" * MAX_TRAILERS, 431),
        (CHUNKED + b"no size", 400),
    ],
    ids=["no request", "no path", "long head", "long trailers", "invalid chunk"],
)
async def test_an_error_response_follows_the_responses_before_it(port: int, data: bytes, status: int) -> None:
    reader, writer = await connect(port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + data)
    responses = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", responses) == [b"200", b"200", str(status).encode()]
    writer.close()


@pytest.mark.parametrize("framing", [b"Content-Length: 29\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_the_body_of_a_refused_upgrade_is_not_read_as_a_request(port: int, framing: bytes) -> None:
    """The parser skips the body of such a request and would read it as the next request."""
    reader, writer = await connect(port)
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + framing + b"\r\n")
    answer = await reader.readuntil(b"}")
    assert answer.startswith(b"HTTP/1.1 400 ")
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n"])
async def test_an_unsupported_upgrade_is_ignored(port: int, length: bytes) -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + length
    reader, writer = await connect(port)
    for _ in range(2):
        writer.write(head + b"\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize("data", [b"HELO\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_invalid_http_gets_a_problem(port: int, data: bytes) -> None:
    assert problem(await exchange(port, data)) == (400, "bad_request")


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"x"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nX: ", b"x"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
    ids=["nothing", "partial head", "partial second head", "empty lines", "unread body"],
)
async def test_a_client_that_sends_too_slowly_is_disconnected(
    port: int, start: bytes, more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    reader, writer = await connect(port)
    writer.write(start)
    if b"\r\n\r\n" in start:
        await reader.readuntil(b"ok")

    async def send_slowly() -> None:
        while more:
            writer.write(more)
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(send_slowly())
    assert await ended(reader) == b""
    sending.cancel()
    writer.close()


async def test_a_client_that_reads_nothing_is_disconnected(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.2)
    lost = asyncio.Event()
    connection_lost = Protocol.connection_lost

    def record(self: Protocol, error: Exception | None) -> None:
        connection_lost(self, error)
        lost.set()

    monkeypatch.setattr(Protocol, "connection_lost", record)
    _, writer = await connect(port)
    writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    await lost.wait()
    writer.close()


async def test_a_client_that_reads_slowly_is_served(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.5)
    reader, writer = await connect(port)
    writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    read = 0
    while chunk := await reader.read(2_000_000):
        read += len(chunk)
        await asyncio.sleep(0.02)
    assert read == BIG_BODY
    writer.close()


async def test_a_connection_over_the_limit_gets_a_503(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "max_connections", lambda: 1)
    reader, writer = await connect(port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"ok")
    response = await exchange(port, b"")
    assert problem(response) == (503, "unavailable")
    assert response[1]["retry-after"] == "1"
    writer.close()


async def test_requests_on_open_connections_are_answered_during_shutdown() -> None:
    """The first request of a connection, and a later one, that arrive while the server shuts down."""
    async with server_of(answer) as server:
        port = port_of(server)
        server.lifespan.state["stopping"] = stopping = asyncio.Event()
        idle, kept, fresh, silent = [await connect(port) for _ in range(4)]
        for reader, writer in idle, kept:
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"connection: close" not in await reader.readuntil(b"ok")
        kept[1].write(b"GET / HT")
        connections: Any = server.server_state.connections
        while sum(each._in_head for each in connections) < 1 or len(connections) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        stopping.set()
        end = asyncio.create_task(server.shutdown())
        assert await idle[0].read() == b""
        for (reader, writer), rest in (kept, b"TP/1.1\r\n\r\n"), (fresh, b"GET / HTTP/1.1\r\n\r\n"):
            writer.write(rest)
            answered = await reader.read()
            assert answered.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in answered
        assert await ended(silent[0]) == b""
        await end
        for _, writer in idle, kept, fresh, silent:
            writer.close()


def test_the_connection_limit_is_plausible() -> None:
    assert 500 <= max_connections() <= 10_000


async def test_a_body_sent_too_slowly_gets_a_408(
    settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.web.requests.BODY_SECONDS", 0.3)
    async with running(settings, issuer) as api:
        ada = api.person()
        assert (await ada.get("/api/v1/tasks")).status_code == 200
        head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: {ada.bearer['Authorization']}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        async for port in serving(api.http._transport.app):  # type: ignore[attr-defined]  # httpx.ASGITransport has it
            assert problem(await exchange(port, head.encode())) == (408, "request_timeout")
