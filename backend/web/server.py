"""uvicorn's HTTP/1.1 protocol with limits for the size of each part of a message, slow clients and connections."""

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from backend.web.connection_limit import max_connections
from backend.web.problems import TITLES
from backend.web.response_cycle import Cycle

MAX_HEAD: Final = 64 * 1024  # bytes: request line and header fields
MAX_TRAILERS: Final = 8 * 1024  # bytes: trailer fields and chunk extensions
MAX_UNREAD: Final = 1024 * 1024  # bytes of a body that arrive after its response; as large as the largest accepted body
PIECE: Final = 4 * 1024  # bytes parsed at once; the parser does not report where in them a part of a message ends
CHUNK_LINES: Final = 16  # bytes that a chunk may need besides its data: its size in 12 digits and two line ends
HEAD_SECONDS: Final = 10.0  # to receive the head of a request, or the rest of a body after its response
LAST_HEAD_SECONDS: Final = 1.0  # the same, during shutdown
LINGER_SECONDS: Final = 2.0  # to discard what a rejected client still sends
STALL_SECONDS: Final = 30.0  # in which a client may read nothing of its response

logger = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """A connection. A message that violates a limit is answered with a problem, and the connection is closed."""

    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _unparsed = b""  # received
    _in_head = False
    _in_body = False  # or in its trailers
    _head = 0  # bytes of the head; without the piece in which it begins, if that holds another message, too
    _trailers = 0  # bytes of complete trailer fields
    _excess = 0  # bytes of the body besides its data, without the pieces in which it begins and ends
    _unread = 0  # bytes of the body received after its response
    _piece = 0  # bytes of the piece that is being parsed
    _earlier = 0  # bytes of the piece that may belong to the message before
    _needed = 0  # bytes of the piece that are body data or chunk sizes
    _upgraded = False
    _rejected = False
    _pending_rejection: bytes | None = None  # sent after the responses to earlier requests

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.flow = Flow(self)
        if len(self.connections) > max_connections():
            self._reject(503, "unavailable", "Too many connections.", retry_after=1)
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unparsed = b""
        self._cancel_deadline()
        if self._stall is not None:
            self._stall.cancel()

    def data_received(self, data: bytes) -> None:
        if self._rejected:
            return
        self._unparsed += data
        self._parse()
        if self.transport.get_protocol() is not self:  # a WebSocket has taken over
            return
        cycle: Any = self.cycle  # None before the first request, against uvicorn's type
        if self._deadline is None and (cycle is None or cycle.response_complete):
            # uvicorn's keep-alive timeout ends with the first byte, even if no head follows.
            self._expect_head()

    def has_waiting(self) -> bool:
        """Whether data has been read that waits for the response to an earlier request."""
        return bool(self.pipeline or self._unparsed)

    def _parse(self) -> None:
        """Parse received data until a request has to wait for an earlier response."""
        data, end = self._unparsed, 0
        self._upgraded = False
        while end < len(data) and not (self._rejected or self._upgraded or self.pipeline):
            start, end = end, end + PIECE
            if self._in_head:
                end = min(end, start + MAX_HEAD - self._head)
                if start == end:
                    self._reject(431, "headers_too_large", f"The message head is larger than {MAX_HEAD} bytes.")
                    break
            piece = data[start:end]
            self._piece, self._earlier, self._needed = len(piece), 0, 0
            super().data_received(piece)
            if self._in_head:
                self._head += self._piece
            elif self._in_body and not self._rejected:
                self._count_body()
        self._unparsed = data[end:] if self.pipeline and not (self._rejected or self._upgraded) else b""

    def _count_body(self) -> None:
        """Count a parsed piece that ends within a body. Rejects a body that exceeds a limit."""
        self._excess = max(0, self._excess + self._piece - self._needed)
        if self.cycle.response_complete:
            self._unread += self._piece
        if self._excess > MAX_TRAILERS or self._unread > MAX_UNREAD:
            self._reject_body()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head = True, -self._earlier

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header field and drop a trailer field, which could forge credentials (RFC 9110, section 6.5.1)."""
        if not self._in_body:
            super().on_header(name, value)
            return
        self._trailers += len(name) + len(b":") + len(value) + len(b"\r\n")
        if self._trailers > MAX_TRAILERS:
            self._reject_body()
            raise ValueError("rejected")  # stops the parser, which has the rest of the piece

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._upgraded = self.parser.should_upgrade()
        self._cancel_deadline()
        if self._upgraded and not self._should_upgrade() and self._has_body():
            self._reject(400, "bad_request", "A request with a body cannot request another protocol.")
            raise ValueError("rejected")  # ends the parser, which would read the body as the next request
        super().on_headers_complete()
        if self._upgraded and self._should_upgrade():
            return
        self._in_body, self._trailers, self._excess, self._unread = True, 0, -self._piece, 0
        cycle: Any = self.cycle
        cycle.__class__ = Cycle
        stopping: asyncio.Event | None = self.app_state.get("stopping")
        if stopping is not None and stopping.is_set():
            # `Connection: close` makes the client send its next request on a new connection, to another worker.
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
        if was_last and self._pending_rejection is not None:
            self._end(self._pending_rejection)
        elif self._unparsed and not self.pipeline:
            self._parse()

    def handle_websocket_upgrade(self) -> None:
        """Pass the connection on to the protocol of the WebSocket library, which has no deadlines of this class."""
        cycle: Any = self.cycle
        if self.ws_protocol_class is None:
            logger.warning("a WebSocket handshake was refused: install the extra `websockets`")
            self._reject(501, "not_implemented", "This server does not support WebSockets.")
        elif cycle is not None and not cycle.response_complete:
            self._reject(400, "bad_request", "A WebSocket handshake must wait for the responses to earlier requests.")
        else:
            if self._stall is not None:
                self._stall.cancel()
            super().handle_websocket_upgrade()

    def _should_upgrade(self) -> bool:
        return self._get_upgrade() == b"websocket"

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: other protocols are ignored (RFC 9110, section 7.8)."""

    def send_400_response(self, msg: str) -> None:
        self._reject(400, "bad_request", msg)

    def shutdown(self) -> None:
        """Close the connection, after the response to a request that is being received or processed."""
        cycle: Any = self.cycle
        if cycle is not None and not self._in_head:
            super().shutdown()
        elif not self._rejected and not self.transport.is_closing():
            self._cancel_deadline()
            self._deadline = self.loop.call_later(LAST_HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_client()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _has_body(self) -> bool:
        """Whether the head announces a body."""
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
            for name, value in self.headers
        )

    def _reject_body(self) -> None:
        detail = f"The trailer fields and chunk extensions of the body are larger than {MAX_TRAILERS} bytes."
        self._reject(431, "headers_too_large", detail)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch_client(self) -> None:
        """Abort the connection if the client reads nothing for STALL_SECONDS."""
        unsent = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() >= unsent:
                self.transport.abort()
            else:
                self._watch_client()

        self._stall = self.loop.call_later(STALL_SECONDS, check)

    def _reject(self, status: int, code: str, detail: str, *, retry_after: int | None = None) -> None:
        """Send a problem after the responses to earlier requests, and parse no more.

        If the body of a request is rejected, its handler sees a disconnect. If its response has begun, the connection
        is aborted; if its response is complete, no second one follows.
        """
        if self._rejected or self.transport.is_closing():
            return
        self._rejected, self._unparsed = True, b""
        title = TITLES.get(status) or HTTPStatus(status).phrase
        problem: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": detail}
        body = json.dumps(problem | {"code": code, "request_id": None}).encode()
        fields = {"Content-Type": "application/problem+json", "Content-Length": len(body), "Connection": "close"}
        if retry_after:
            fields["Retry-After"] = retry_after
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        rejection = f"HTTP/1.1 {status} {title}\r\n{head}\r\n".encode() + body
        if retry_after:  # too many connections: close at once
            self._cancel_deadline()
            self.transport.write(rejection)
            self.transport.close()
            return
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self._end(b"" if self._in_body else rejection)
        elif not self._in_body:
            self._pending_rejection = rejection
        elif self.pipeline:  # whose newest request is the rejected one
            self.pipeline.popleft()
            self._pending_rejection = rejection
        elif cycle.response_started:
            self.transport.abort()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._end(rejection)

    def _end(self, response: bytes) -> None:
        """Send the last response and close.

        A client that is still sending would lose it to a reset, so data is discarded for LINGER_SECONDS first.
        """
        self._cancel_deadline()
        self.flow.resume_reading()
        self.transport.write(response)
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


class Flow(FlowControl):
    """uvicorn's flow control, but reading does not resume while requests wait for earlier responses.

    A client could otherwise send requests faster than they are processed, without limit.
    """

    def __init__(self, connection: Protocol) -> None:
        super().__init__(connection.transport)
        self._connection = connection

    def resume_reading(self) -> None:
        if self.read_paused and not self._connection.has_waiting():
            super().resume_reading()
