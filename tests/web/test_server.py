"""Clients that are slow, endless or too many: over real sockets, through uvicorn."""

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
from backend.web.response_cycle import Cycle
from backend.web.server import MAX_HEAD, MAX_TRAILERS, MAX_UNREAD, PIECE, Protocol, max_connections
from tests.conftest import running

BIG = 20_000_000


async def answer(scope: Scope, _: Receive, send: Send) -> None:
    """`/` says ok without reading the body, `/big` more than any buffer holds."""
    size = BIG if scope["path"] == "/big" else 2
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * size if size == BIG else b"ok"})


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
    """Send it, and read until the server ends the connection."""
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


def problem(found: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    status, headers, body = found
    assert headers["content-type"] == "application/problem+json"
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    told = json.loads(body)
    assert told.keys() == {"type", "title", "status", "detail", "code", "request_id"}
    assert told["status"] == status
    return status, told["code"]


async def test_a_request_goes_through_and_its_connection_stays(port: int) -> None:
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


class Noted:
    """A transport, and what was written to it."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self._transport.write(data)


async def test_an_answer_that_is_whole_leaves_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is held back of one that is not."""
    transports: list[Noted] = []
    begin, seen = Protocol.connection_made, asyncio.Event()

    def begin_noted(self: Protocol, transport: asyncio.Transport) -> None:
        transports.append(Noted(transport))
        begin(self, cast("asyncio.Transport", transports[-1]))

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

    monkeypatch.setattr(Protocol, "connection_made", begin_noted)
    async with server_of(app) as server, asyncio.timeout(20):
        reader, writer = await connect(port_of(server))
        (written,) = [transport.written for transport in transports]
        go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"POST /whole HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == go_on
        writer.write(b"x")
        whole = await reader.readuntil(b"\r\n\r\nok")
        assert written == [go_on, whole]
        # Two at once, of which the first has a head and nothing else.
        writer.write(b"HEAD /whole HTTP/1.1\r\nHost: x\r\n\r\nGET /whole HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == whole.removesuffix(b"ok")
        assert await reader.readuntil(b"ok") == whole
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\nfirst\r\n")).startswith(b"HTTP/1.1 200"), "the second is not there yet"
        seen.set()
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"GET /fails HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read() == b"", "what had begun is cut"
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
async def test_what_is_sent_is_what_uvicorn_sends(
    headers: list[tuple[str, str]],
    length: list[tuple[str, str]],
    body: bytes,
    method: str,
    status: int,
    keep_alive: bool,
) -> None:
    async def sent(kind: type[RequestResponseCycle]) -> tuple[bytes, type[Exception] | None, bool, bool]:
        written: list[bytes] = []
        transport = SimpleNamespace(write=written.append, close=lambda: written.append(b" closed"))
        logger, ended = logging.getLogger("none"), asyncio.Event()
        cycle = kind(
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
            with pytest.raises(RuntimeError):  # begins once, and is there still
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
    ids=["endless field", "long field", "many fields", "endless path", "of the second request"],
)
async def test_a_head_that_is_too_long_is_refused(port: int, data: bytes) -> None:
    status, headers, body = await exchange(port, data)
    if status == 200:  # of the first request
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
async def test_the_bound_of_a_head_does_not_depend_on_how_it_arrives(
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


async def test_what_precedes_a_head_does_not_count(port: int) -> None:
    data = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2_000 + head_of(MAX_HEAD)
    status, _, body = await exchange(port, data)
    assert status == 200
    assert body.startswith(b"okHTTP/1.1 200")


async def test_a_long_head_is_fine(port: int) -> None:
    data = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + b"x" * 40_000 + b"\r\n\r\n"
    assert (await exchange(port, data))[0] == 200


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
FORGED = b"Authorization: forged\r\nX-Forwarded-For: 192.0.2.1\r\nExpect: 100-continue\r\nConnection: upgrade\r\n"
MUCH = 64 * 1024 * 1024


class Reader:
    """An application that reads each body to its end, and notes what it was given."""

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


@pytest.mark.parametrize("size", [MUCH, 1], ids=["whole", "byte by byte"])
async def test_a_trailer_field_is_no_header(size: int) -> None:
    """Nor one of the next request."""
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
        answers = await reader.read()
        writer.close()
    assert answers.count(b"HTTP/1.1 200") == 3
    headers = [(b"host", b"x"), (b"transfer-encoding", b"chunked")]
    assert app.seen == [
        (headers, b"abc"),
        ([*headers, (b"expect", b"100-continue")], b"de"),
        ([(b"host", b"x"), (b"connection", b"close")], b""),
    ]


@pytest.mark.parametrize(("length", "status"), [(MAX_TRAILERS, 200), (MAX_TRAILERS + 2, 431)])
async def test_trailer_fields_have_a_bound(port: int, length: int, status: int) -> None:
    field = b"X: " + b"x" * (length - len(b"X: \r\n")) + b"\r\n"
    data = CHUNKED + b"3\r\nabc\r\n0\r\n" + field + b"\r\n"
    closing = CHUNKED.replace(b"Host: x", b"Host: x\r\nConnection: close") + data.removeprefix(CHUNKED)
    reader, writer = await connect(port)
    writer.write(data)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 %d" % status)
    if status == 200:  # so that the next request has as many
        writer.write(closing)
        assert (await reader.read()).startswith(b"okHTTP/1.1 200")
    writer.close()


@contextmanager
def little_memory() -> Iterator[None]:
    """Nothing inside holds more than 4 MiB at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()


async def flood(connection: Connection, start: bytes, more: bytes) -> tuple[int, bytes]:
    """Send `more` again and again until the server ends the connection; how much was sent, and what was answered."""
    reader, writer = connection
    answered = asyncio.create_task(ended(reader))
    block, sent = more * max(1, 65_536 // len(more)), 0
    writer.write(start)
    with suppress(ConnectionError):
        while not answered.done() and sent < MUCH and tracemalloc.get_traced_memory()[1] < MUCH / 8:
            writer.write(block)
            await writer.drain()
            await asyncio.sleep(0)
            sent += len(block)
    writer.transport.abort()
    return sent, await answered


ENDLESS = pytest.mark.parametrize(
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


@ENDLESS
async def test_what_a_body_has_besides_its_data_is_bounded(start: bytes, more: bytes) -> None:
    app = Reader()
    async with server_of(app) as server, asyncio.timeout(60):
        with little_memory():
            sent, answered = await flood(await connect(port_of(server)), CHUNKED + start, more)
        assert sent < MUCH / 4
        head, _, body = answered.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431")
        assert json.loads(body)["code"] == "headers_too_large"
        assert (app.seen, app.disconnects) == ([], 1)


@ENDLESS
async def test_it_is_bounded_after_the_response(port: int, start: bytes, more: bytes) -> None:
    """Which stays the only one."""
    reader, writer = await connect(port)
    writer.write(CHUNKED)
    await reader.readuntil(b"ok")
    async with asyncio.timeout(60):
        with little_memory():
            sent, answered = await flood((reader, writer), start, more)
    assert sent < MUCH / 4
    assert answered == b""


async def test_a_response_that_has_begun_is_cut() -> None:
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


async def test_a_body_that_nobody_reads_is_bounded(port: int) -> None:
    reader, writer = await connect(port)
    for _ in range(2):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % MAX_UNREAD)
        await reader.readuntil(b"ok")
        writer.write(b"x" * MAX_UNREAD)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (2 * MUCH))
    await reader.readuntil(b"ok")
    sent, answered = await flood((reader, writer), b"", b"x" * 65_536)
    assert sent < MUCH / 2
    assert answered == b""


async def test_pipelined_requests_are_all_answered() -> None:
    """And wait unread: no more is held of them than one piece, parsed, and one read."""
    waiting = unparsed = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal waiting, unparsed
        await receive()
        (connection,) = cast("set[Any]", one.server_state.connections)
        waiting, unparsed = max(waiting, len(connection.pipeline)), max(unparsed, len(connection._unparsed))
        await answer(scope, receive, send)

    request = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 275 + b"\r\n\r\n"
    assert len(request) == 307
    async with server_of(app) as one, asyncio.timeout(60):
        reader, writer = await connect(port_of(one))
        writer.write(request * 3_999 + request.replace(b"X: xxxxxxxxxxxxxxxxx", b"Connection: close\r\nX:"))
        answers = await reader.read()
        writer.close()
    assert answers.count(b"HTTP/1.1 200") == answers.count(b"HTTP/1.1 ") == 4_000
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
    ids=["no request", "no path", "a long head", "long trailers", "a broken body"],
)
async def test_a_refusal_follows_the_responses_before_it(port: int, data: bytes, status: int) -> None:
    reader, writer = await connect(port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + data)
    answers = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"200", str(status).encode()]
    writer.close()


@pytest.mark.parametrize("framing", [b"Content-Length: 29\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_a_body_is_no_request_after_an_upgrade_that_is_not_made(port: int, framing: bytes) -> None:
    """The parser passes over the body of such a request, and would read it as the next one."""
    reader, writer = await connect(port)
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + framing + b"\r\n")
    answer = await reader.readuntil(b"}")
    assert answer.startswith(b"HTTP/1.1 400 ")
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n"])
async def test_an_upgrade_that_is_not_made_is_passed_over(port: int, length: bytes) -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + length
    reader, writer = await connect(port)
    for _ in range(2):
        writer.write(head + b"\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize("data", [b"HELO\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_what_is_no_http_is_a_problem(port: int, data: bytes) -> None:
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
    ids=["silence", "half a head", "half of the second", "empty lines", "a body that nobody waits for"],
)
async def test_who_trickles_is_cut(port: int, start: bytes, more: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    reader, writer = await connect(port)
    writer.write(start)
    if b"\r\n\r\n" in start:
        await reader.readuntil(b"ok")

    async def trickle() -> None:
        while more:
            writer.write(more)
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle())
    assert await ended(reader) == b""
    trickling.cancel()
    writer.close()


async def test_who_reads_nothing_is_cut(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.2)
    lost = asyncio.Event()
    connection_lost = Protocol.connection_lost

    def noted(self: Protocol, error: Exception | None) -> None:
        connection_lost(self, error)
        lost.set()

    monkeypatch.setattr(Protocol, "connection_lost", noted)
    _, writer = await connect(port)
    writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    await lost.wait()
    writer.close()


async def test_who_reads_slowly_is_not(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.5)
    reader, writer = await connect(port)
    writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    read = 0
    while chunk := await reader.read(2_000_000):
        read += len(chunk)
        await asyncio.sleep(0.02)
    assert read == BIG
    writer.close()


async def test_one_connection_too_many_is_told(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "max_connections", lambda: 1)
    reader, writer = await connect(port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"ok")
    found = await exchange(port, b"")
    assert problem(found) == (503, "unavailable")
    assert found[1]["retry-after"] == "1"
    writer.close()


async def test_who_has_been_let_in_is_answered_at_the_end() -> None:
    """A request that is on its way when the server closes: the first one of a connection, and a later one."""
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


def test_there_is_room_for_connections() -> None:
    assert 500 <= max_connections() <= 10_000


async def test_a_body_that_trickles_is_a_408(
    settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.web.requests.BODY_SECONDS", 0.3)
    async with running(settings, issuer) as api:
        ada = api.person()
        assert (await ada.get("/api/v1/tasks")).status_code == 200
        head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: {ada.bearer['Authorization']}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        async for port in serving(api.http._transport.app):  # type: ignore[attr-defined]  # of httpx.ASGITransport
            assert problem(await exchange(port, head.encode())) == (408, "request_timeout")
