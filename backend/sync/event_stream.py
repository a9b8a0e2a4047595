"""Server-sent events of a feed of changes, delivered in every worker within a second of the commit.

A stream keeps only its position in the feed. It takes recent events from the broker's channel; if the channel does not
reach back far enough (after a reconnect, or for a slow reader), it reads the missing ones from the database. Memory per
reader is therefore constant, and a client that reconnects with `Last-Event-ID` misses nothing.
"""

import asyncio
import random
from typing import Annotated, Any, Final

import psycopg
from fastapi import Header, Request, Response
from starlette.types import Receive, Scope, Send

from backend.sync import broker
from backend.sync.broker import Broker
from backend.sync.changes import EXAMPLE, Changes, Feed, Position, SyncTokenExpired
from backend.users.caller import Caller

GRACE: Final = 1.0  # seconds that the last event of a stream has to reach the client
RETRY: Final = 1.0, 4.0  # seconds after which clients reconnect, at random so that they do not return all at once

LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        max_length=300,
        description="`id` of the last event received, or `next` of the changes. The stream continues after it.",
        examples=[EXAMPLE],
    ),
]

# For OpenAPI.
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events until the token expires. When there are none, a comment is sent every 15 seconds.",
        "headers": {
            "X-Accel-Buffering": {
                "description": "`no`: a proxy should pass each event on at once.",
                "schema": {"type": "string", "enum": ["no"]},
                "example": "no",
            }
        },
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


class Stream(Response):
    """A stream of events for one client.

    Before the first byte it may still be refused: 410 or 422 for `Last-Event-ID`, 429 for too many streams.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, caller: Caller, feed: Feed, last_event_id: str | None) -> None:
        state = request.state
        self.status_code, self.background = 200, None
        self.init_headers({"X-Accel-Buffering": "no"})  # nginx buffers responses otherwise
        self.feed = feed
        self.issued_at = caller.principal.issued_at
        self._seconds: float = state.bearer.verifier.seconds_left(caller.principal)
        self._broker: Broker = state.broker
        self._owner_id = caller.user.id
        self._database = caller.database
        self._last_event_id = last_event_id
        self._woken = asyncio.Event()
        self._end_reason: str | None = None
        self._writer: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """New events may be available."""
        self._woken.set()

    def end(self, reason: str) -> None:
        """Send the reason to the client and close the stream, after GRACE seconds in any case."""
        if self._end_reason is None:
            self._end_reason = reason
            self._woken.set()
            if self._writer is not None:
                asyncio.get_running_loop().call_later(GRACE, self._writer.cancel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner = self._broker.join(self, self._owner_id)
        expiry = asyncio.get_running_loop().call_later(self._seconds, self.end, "token_expired")
        try:
            since, first = await self._begin()
            self._channel = self._broker.channel(owner, self.feed, first.head)
            if scope.get("headers_only"):
                self.end("head")
            self._writer = asyncio.create_task(self._write(send, since, first))
            gone = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({self._writer, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._writer.cancel()
                gone.cancel()
                await asyncio.wait({self._writer, gone})
        finally:
            expiry.cancel()
            self._broker.leave(self, owner)
        if not self._writer.cancelled():
            self._writer.result()

    async def _begin(self) -> tuple[Position, Changes]:
        """Return the client's position and the changes after it. Without `Last-Event-ID` the stream begins now."""
        if self._last_event_id is None:
            first = await self.feed.now(self._database)
            return first.next, first
        since = Position.decode(self._last_event_id, self.feed.name, "header", "Last-Event-ID")
        return since, await self.feed.after(self._database, since, broker.PAGE)

    async def _write(self, send: Send, position: Position, first: Changes) -> None:
        async def put(events: list[bytes], *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        retry = int(1000 * random.uniform(*RETRY))  # noqa: S311  # nothing to guess
        # The id comes before the first event, so that a stream which breaks early can still be resumed.
        events = [f"retry: {retry}\nid: {position.encode(self.feed.name)}\n\n".encode()]
        events += [self.feed.event(*item) for item in first.items]
        position = first.next
        while self._end_reason is None:
            await put(events)
            events = []
            while not events and self._end_reason is None:
                self._woken.clear()
                events, position = await self._next_events(position)
                if not events and not await self._wait():
                    events = [b":\n\n"]
        await put([f'event: end\ndata: {{"reason": "{self._end_reason}"}}\n\n'.encode()], more=False)

    async def _next_events(self, position: Position) -> tuple[list[bytes], Position]:
        """Return the events after a position, and the position after them."""
        events = self._channel.after(position)
        if events is not None:
            return events, max(position, self._channel.end, key=lambda each: each.place)
        try:
            changes = await self.feed.after(self._database, position, broker.PAGE)
        except SyncTokenExpired as error:
            self.end(error.code)
        except psycopg.Error:
            await asyncio.sleep(self._broker.period)  # the database is unavailable: try again
            self._woken.set()
        else:
            return [self.feed.event(*item) for item in changes.items], changes.next
        return [], position

    async def _wait(self) -> bool:
        """Wait for new events. Returns False when a heartbeat is due."""
        try:
            async with asyncio.timeout(self._broker.heartbeat):
                await self._woken.wait()
        except TimeoutError:
            return False
        return True


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
