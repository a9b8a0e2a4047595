"""The response of one request: uvicorn's cycle, which sends a complete response in one write."""

import re
from functools import lru_cache
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_NAME: Final = re.compile(rb"[a-z0-9-]+")
_CONTROL: Final = bytes([*range(9), *range(10, 32), 127])  # not allowed in field values (RFC 9110, section 5.5)


class Cycle(RequestResponseCycle):
    """A request and its response. A complete response is sent in one system call and one packet.

    The head is held back until the first part of the body (ASGI, "Response Start"). Streams, responses to HEAD and
    responses with unusual headers use uvicorn's implementation, which also rejects what must not be sent.
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
        if (response := self._serialize(start, message)) is not None:
            self.response_complete = True
            self.waiting_for_100_continue = False
            self.transport.write(response)
            self.message_event.set()
            self.on_response()
        else:
            self.response_started = False
            await super().send(start)
            await super().send(message)

    def _serialize(self, start: Any, message: Any) -> bytes | None:
        """The complete response in bytes; None if uvicorn has to send it."""
        needs_uvicorn = self.flow.write_paused or self.disconnected or not self.keep_alive
        if needs_uvicorn or message.get("more_body") or self.scope["method"] == "HEAD":
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
        joined = b"".join(values)
        if length != b"%d" % len(body) or len(joined.translate(None, _CONTROL)) < len(joined):
            return None
        pieces += (b"\r\n", body)
        return b"".join(pieces)


@lru_cache(256)
def _field(name: bytes) -> bytes | None:
    """The name of a field with its colon; None for unusual names and for fields that control the connection."""
    return name + b": " if _NAME.fullmatch(name) and name not in (b"connection", b"transfer-encoding") else None
