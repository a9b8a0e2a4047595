"""uvicorn's HTTP/1.1 with the bounds it lacks: for each part of a message, for slow clients, for their number.

And an answer that is whole leaves in one piece (`docs/performance.md`).
"""

import asyncio
import json
import re
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from backend.web.problems import TITLES

MAX_HEAD: Final = 64 * 1024  # bytes: request line and header fields
MAX_TRAILERS: Final = 8 * 1024  # bytes of a body that are not its data: trailer fields and chunk extensions
MAX_UNREAD: Final = 1024 * 1024  # bytes of a body after the response to it, as many as any route reads
PIECE: Final = 4 * 1024  # bytes parsed at once; the parser does not tell where in them a part of a message ends
CHUNK_LINES: Final = 16  # bytes: the size of a chunk in 12 digits and two line ends
HEAD_SECONDS: Final = 10.0  # until the head of a request is there, or a body that nobody waits for has ended
LAST_HEAD_SECONDS: Final = 1.0  # the same, at the end of the process
LINGER_SECONDS: Final = 2.0
STALL_SECONDS: Final = 30.0  # without a reader taking anything
MOST_CONNECTIONS: Final = 10_000  # of a worker, if the system lets it have as many files
_OTHER_FILES: Final = 200  # database, Redis, log, listening socket, libraries
_NAME: Final = re.compile(rb"[a-z0-9-]+")
_CONTROL: Final = bytes([*range(9), *range(10, 32), 127])  # what no value may hold (RFC 9110, 5.5)


class Protocol(HttpToolsProtocol):
    """A connection. What it refuses by itself is a problem, too, and ends it."""

    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _rest = b""  # received and not parsed yet
    _in_head = False
    _in_body = False  # or in its trailers
    _head = 0  # bytes; of a head that begins in the middle of a piece, without that piece
    _trailers = 0  # bytes of complete trailer fields
    _excess = 0  # bytes of a body that are not its data, without the pieces in which it begins and ends
    _unread = 0  # bytes of a body after the response to it
    _piece = 0  # bytes, of what is being parsed
    _earlier = 0  # bytes of the piece that may belong to an earlier message
    _needed = 0  # bytes of the piece that are data of a body, or lines that its chunks need
    _upgraded = False
    _refused = False
    _pending_answer: bytes | None = None  # the answer to what was refused, while earlier responses are pending

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.flow = Flow(self)
        if len(self.connections) > most_connections():
            self._refuse(503, "unavailable", "Too many connections.", retry_after=1)
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest = b""
        self._disarm()
        if self._stall is not None:
            self._stall.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._rest += data
        self._parse()
        if self.transport.get_protocol() is not self:  # a WebSocket has taken over
            return
        cycle: Any = self.cycle  # uvicorn's type forgets that there may be none yet
        if self._deadline is None and (cycle is None or cycle.response_complete):
            # uvicorn's own time for silence ends with the first byte, whatever it is.
            self._expect_head()

    def has_waiting(self) -> bool:
        """Whether something that has been read waits for the response to an earlier request."""
        return bool(self.pipeline or self._rest)

    def _parse(self) -> None:
        """Parse what has been received until a request has to wait for the response to another one."""
        data, end = self._rest, 0
        self._upgraded = False
        while end < len(data) and not (self._refused or self._upgraded or self.pipeline):
            start, end = end, end + PIECE
            if self._in_head:
                end = min(end, start + MAX_HEAD - self._head)
                if start == end:
                    self._refuse(431, "headers_too_large", f"The header is longer than {MAX_HEAD} bytes.")
                    break
            piece = data[start:end]
            self._piece, self._earlier, self._needed = len(piece), 0, 0
            super().data_received(piece)
            if self._in_head:
                self._head += self._piece
            elif self._in_body and not self._refused:
                self._count_body()
        self._rest = data[end:] if self.pipeline and not (self._refused or self._upgraded) else b""

    def _count_body(self) -> None:
        """Count the piece that has been parsed, which ends within a body. Refuses what has become too long."""
        self._excess = max(0, self._excess + self._piece - self._needed)
        if self.cycle.response_complete:
            self._unread += self._piece
        if self._excess > MAX_TRAILERS or self._unread > MAX_UNREAD:
            self._refuse_body()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head = True, -self._earlier

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header field. A trailer field is dropped: it could name another caller or another address.

        RFC 9110, 6.5.1.
        """
        if not self._in_body:
            super().on_header(name, value)
            return
        self._trailers += len(name) + len(b":") + len(value) + len(b"\r\n")
        if self._trailers > MAX_TRAILERS:
            self._refuse_body()
            raise ValueError("refused")  # ends the parser, which has the rest of the piece

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._upgraded = self.parser.should_upgrade()
        self._disarm()
        if self._upgraded and not self._should_upgrade() and self._has_body():
            self._refuse(400, "bad_request", "A request with a body cannot ask for another protocol.")
            raise ValueError("refused")  # ends the parser, which would read the body as the next request
        super().on_headers_complete()
        self._in_body, self._trailers, self._excess, self._unread = True, 0, -self._piece, 0
        cycle: Any = self.cycle
        if cycle is None:  # a handshake of WebSocket
            return
        cycle.__class__ = Cycle
        stopping: asyncio.Event | None = self.app_state.get("stopping")
        if stopping is not None and stopping.is_set():
            # The answer says `Connection: close`: the next request goes elsewhere, not into a connection that ends.
            cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        self._needed += CHUNK_LINES

    def on_body(self, body: bytes) -> None:
        self._needed += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._earlier = False, self._piece
        super().on_message_complete()

    def on_response_complete(self) -> None:
        was_last = not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if was_last and self._pending_answer is not None:
            self._end(self._pending_answer)
        elif self._rest and not self.pipeline:
            self._parse()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_request", msg)

    def shutdown(self) -> None:
        """uvicorn's word to end. Where a request is on its way, it is answered first."""
        cycle: Any = self.cycle
        if cycle is not None and not self._in_head:
            super().shutdown()
        elif not self._refused and not self.transport.is_closing():
            self._disarm()
            self._deadline = self.loop.call_later(LAST_HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _has_body(self) -> bool:
        """Whether the head says that a body follows."""
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
            for name, value in self.headers
        )

    def _refuse_body(self) -> None:
        detail = f"The trailer fields and chunk extensions of the body are longer than {MAX_TRAILERS} bytes."
        self._refuse(431, "headers_too_large", detail)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch_reader(self) -> None:
        """Cut the connection when its reader takes nothing for long."""
        waiting = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() >= waiting:
                self.transport.abort()
            else:
                self._watch_reader()

        self._stall = self.loop.call_later(STALL_SECONDS, look)

    def _refuse(self, status: int, code: str, detail: str, *, retry_after: int | None = None) -> None:
        """Answer once the responses before it are complete, and parse no more.

        Of a message whose body is refused, the handler sees a disconnect. If its response has begun, the connection is
        cut; if the response is complete, no second one follows.
        """
        if self._refused or self.transport.is_closing():
            return
        self._refused, self._rest = True, b""
        title = TITLES.get(status) or HTTPStatus(status).phrase
        problem: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": detail}
        body = json.dumps(problem | {"code": code, "request_id": None}).encode()
        fields = {"Content-Type": "application/problem+json", "Content-Length": len(body), "Connection": "close"}
        if retry_after:
            fields["Retry-After"] = retry_after
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        answer = f"HTTP/1.1 {status} {title}\r\n{head}\r\n".encode() + body
        if retry_after:  # nothing has been sent yet, and there is no room for those who wait
            self._disarm()
            self.transport.write(answer)
            self.transport.close()
            return
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self._end(b"" if self._in_body else answer)
        elif not self._in_body:
            self._pending_answer = answer
        elif self.pipeline:  # in which the newest is the one that is refused
            self.pipeline.popleft()
            self._pending_answer = answer
        elif cycle.response_started:
            self.transport.abort()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._end(answer)

    def _end(self, answer: bytes) -> None:
        """Write the last answer and close.

        A reset would take it away from a client that is still sending, so what arrives is discarded for a while.
        """
        self._disarm()
        self.flow.resume_reading()
        self.transport.write(answer)
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


class Flow(FlowControl):
    """uvicorn's flow control, which does not resume reading while requests that have been read are waiting.

    A client could otherwise add requests faster than they are answered, without end.
    """

    def __init__(self, connection: Protocol) -> None:
        super().__init__(connection.transport)
        self._connection = connection

    def resume_reading(self) -> None:
        if self.read_paused and not self._connection.has_waiting():
            super().resume_reading()


class Cycle(RequestResponseCycle):
    """A request, and its answer: one that is whole at once leaves in one system call, and in one packet.

    Nothing goes out before the first of a body (ASGI, "Response Start"). A stream, and whatever else is not plain, is
    left to uvicorn, which also knows what to say of what must not be sent. An answer that breaks off is cut.
    """

    _start: Any = None

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            self._start, self.response_started = message, True
            return
        if self._start is None or message["type"] != "http.response.body":
            await super().send(message)
            return
        start, self._start = self._start, None
        if (answer := self._whole(start, message)) is not None:
            self.response_complete = True
            self.waiting_for_100_continue = False
            self.transport.write(answer)
            self.message_event.set()
            self.on_response()
        else:
            self.response_started = False
            await super().send(start)
            await super().send(message)

    def _whole(self, start: Any, message: Any) -> bytes | None:
        """The answer as it goes over the wire, unless something about it is not plain."""
        is_busy = self.flow.write_paused or self.disconnected or not self.keep_alive
        if is_busy or message.get("more_body") or self.scope["method"] == "HEAD":
            return None
        body: bytes = message.get("body", b"")
        pieces, values, length = [STATUS_LINE[start["status"]]], [], None
        for name, value in (*self.default_headers, *start.get("headers", ())):
            if (field := _field(name)) is None or (length is not None and name == b"content-length"):
                return None
            if name == b"content-length":
                length = value
            values.append(value)
            pieces += (field, value, b"\r\n")
        told = b"".join(values)
        if length != b"%d" % len(body) or len(told.translate(None, _CONTROL)) < len(told):
            return None
        pieces += (b"\r\n", body)
        return b"".join(pieces)


@lru_cache(256)
def _field(name: bytes) -> bytes | None:
    """How the field begins, if it may have any name like this and says nothing of the connection."""
    return name + b": " if _NAME.fullmatch(name) and name not in (b"connection", b"transfer-encoding") else None


@lru_cache(1)
def most_connections() -> int:
    """As many as the process may have files for, once it has asked for all that it can get."""
    try:
        import resource
    except ImportError:
        return MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _OTHER_FILES
    if 0 <= soft < wanted:
        soft = wanted if hard < 0 else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MOST_CONNECTIONS, soft - _OTHER_FILES) if soft >= 0 else MOST_CONNECTIONS
