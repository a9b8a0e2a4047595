"""Live updates: server-sent events of a feed of changes, in every worker within a second, and none of them lost.

A stream knows no more than its position in the feed. What has just changed it takes from what the worker remembers for
all streams of its owner; when that does not reach back to where it is, because it resumes or its reader is slow, it
reads on from there itself. So nothing is kept for anybody who does not read, and whoever comes back misses nothing.

One statement for each worker asks for all owners who have streams: whose counter has moved, and who may read no more.
(NOTIFY would take a lock of the whole server's in every write.)
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID

import psycopg
from fastapi import Header, Request, Response
from sqlalchemy import ARRAY, BigInteger, DateTime, Uuid, bindparam, func, literal_column, or_
from sqlmodel import col, select
from starlette.types import Receive, Scope, Send

from backend.changes import EXAMPLE, ChangeCounter, Changes, Feed, Position, SyncTokenExpired
from backend.database import SYSTEM, Actor, Database, Pool, Row, Statement
from backend.problems import DomainError
from backend.users.models import User, UserStatus

logger = logging.getLogger(__name__)

PERIOD: Final = 0.3  # seconds, as the next three
HEARTBEAT: Final = 15.0
GRACE: Final = 1.0  # for the last event to get out
RETRY: Final = 1.0, 4.0  # until a client comes back: not all of them at once
MOST_STREAMS: Final = 20  # of one person, in one worker
MOST_REMEMBERED: Final = 64 * 1024  # bytes of events, of one owner and feed
PAGE: Final = 100
READS_AT_ONCE: Final = 4

LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        max_length=300,
        description="The `id` of the last event that was received, or `next` of the changes: go on from there.",
        examples=[EXAMPLE],
    ),
]

# For OpenAPI.
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events until the token expires. Comments come every 15 seconds when nothing else does.",
        "headers": {
            "X-Accel-Buffering": {
                "description": "`no`: a proxy is to pass on each event as it comes.",
                "schema": {"type": "string", "enum": ["no"]},
                "example": "no",
            }
        },
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

_ASKED = (
    func.unnest(
        bindparam("owners", type_=ARRAY(Uuid)),
        bindparam("numbers", type_=ARRAY(BigInteger)),
        bindparam("issued", type_=ARRAY(DateTime(timezone=True))),
    )
    .table_valued("owner", "n", "issued", name="asked")
    .render_derived()
)
_NUMBER = func.coalesce(col(ChangeCounter.n), literal_column("0"))
_CLOSED = or_(col(User.id).is_(None), col(User.status) != UserStatus.active.value)
POLL = Statement(
    select(
        _ASKED.c.owner,
        _NUMBER.label("n"),
        _CLOSED.label("closed"),
        func.date_trunc("second", col(User.tokens_valid_after)).label("floor"),
    )
    .select_from(
        _ASKED.outerjoin(User, col(User.id) == _ASKED.c.owner).outerjoin(
            ChangeCounter, col(ChangeCounter.owner_id) == _ASKED.c.owner
        )
    )
    .where(
        or_(
            _ASKED.c.n != _NUMBER,  # which is less in a database that was set back
            _CLOSED,
            func.date_trunc("second", col(User.tokens_valid_after)) >= _ASKED.c.issued,
        )
    )
)


class TooManyStreams(DomainError):
    """This account has as many streams of events open as it may: close one first."""

    status, code = 429, "too_many_streams"


class Channel:
    """What an owner's feed has told lately, up to `end`; what it told before `start` is not remembered."""

    def __init__(self, feed: Feed, at: Position) -> None:
        self.feed = feed
        self.start = self.end = at
        self._recent: deque[tuple[Position, bytes]] = deque()
        self._size = 0

    def add(self, changes: Changes) -> None:
        for position, row in changes.items:
            event = self.feed.event(position, row)
            self._recent.append((position, event))
            self._size += len(event)
        while self._size > MOST_REMEMBERED:
            self.start, event = self._recent.popleft()
            self._size -= len(event)
        self.end = changes.next

    def after(self, position: Position) -> list[bytes] | None:
        """The events between a position and `end`; None when they are not all remembered."""
        if position.place < self.start.place:
            return None
        return [event for at, event in self._recent if at.place > position.place]


class Owner:
    """One who has streams open in this worker."""

    def __init__(self, id: UUID) -> None:
        self.id = id
        self.streams: set[Stream] = set()
        self.channels: dict[str, Channel] = {}

    @property
    def seen(self) -> int:
        """The number up to which all channels know what there is."""
        return min(channel.end.n for channel in self.channels.values())

    @property
    def issued(self) -> datetime:
        """When the oldest token of those that read was issued."""
        return datetime.fromtimestamp(min(stream.issued_at for stream in self.streams), UTC)


class Live:
    """All streams of this worker, and the one who looks for changes every `period` seconds while there are any."""

    def __init__(self, pool: Pool, *, period: float = PERIOD, heartbeat: float = HEARTBEAT) -> None:
        self.period = period
        self.heartbeat = heartbeat
        self._pool = pool
        self._owners: dict[UUID, Owner] = {}
        self._somebody = asyncio.Event()
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
        self._stopping = False
        self._failing = False

    def __len__(self) -> int:
        """How many streams are open."""
        return sum(len(owner.streams) for owner in self._owners.values())

    def join(self, stream: "Stream", id: UUID) -> Owner:
        """Raises TooManyStreams."""
        owner = self._owners.setdefault(id, Owner(id))
        if len(owner.streams) >= MOST_STREAMS:
            raise TooManyStreams
        owner.streams.add(stream)
        if self._stopping:
            stream.end("shutdown")
        return owner

    def channel(self, owner: Owner, feed: Feed, head: Position) -> Channel:
        """What is told of a feed. `head`: how far it went when the stream was opened."""
        self._somebody.set()
        return owner.channels.setdefault(feed.name, Channel(feed, head))

    def leave(self, stream: "Stream", owner: Owner) -> None:
        owner.streams.discard(stream)
        for name in set(owner.channels) - {stream.feed.name for stream in owner.streams}:
            del owner.channels[name]
        if not owner.streams:
            del self._owners[owner.id]
        if not self._owners:
            self._somebody.clear()

    def stop(self) -> None:
        """End all streams, those that come yet, too: their readers shall go elsewhere."""
        self._stopping = True
        for owner in self._owners.values():
            for stream in owner.streams:
                stream.end("shutdown")

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        job = asyncio.create_task(self._watch(), name="live updates")
        try:
            yield
        finally:
            self.stop()
            job.cancel()
            with suppress(asyncio.CancelledError):
                await job

    async def _watch(self) -> None:
        while True:
            await self._somebody.wait()
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - the edge of a background task: whatever it was, look again
                self._note(error)
            else:
                self._note(None)
            await asyncio.sleep(self.period)

    async def _look(self) -> None:
        asked = {owner.id: owner for owner in self._owners.values() if owner.channels}
        rows = await Database(self._pool, SYSTEM).rows(
            POLL,
            owners=list(asked),
            numbers=[owner.seen for owner in asked.values()],
            issued=[owner.issued for owner in asked.values()],
        )
        told = await asyncio.gather(*(self._tell(asked[row["owner"]], row) for row in rows), return_exceptions=True)
        for result in told:
            if isinstance(result, BaseException):
                raise result

    async def _tell(self, owner: Owner, row: Row) -> None:
        for stream in owner.streams:
            if row["closed"] or (row["floor"] and stream.issued_at <= row["floor"].timestamp()):
                stream.end("revoked")
        if row["closed"]:
            return
        for channel in list(owner.channels.values()):
            if row["n"] != channel.end.n:
                await self._read_on(owner, channel)

    async def _read_on(self, owner: Owner, channel: Channel) -> None:
        """Once for all streams, however many there are."""
        database, more = Database(self._pool, Actor.user(owner.id)), True
        while more:
            async with self._reads:
                try:
                    changes = await channel.feed.after(database, channel.end, PAGE)
                except SyncTokenExpired as error:
                    # No event can tell what is lost. Who had read it already goes on with the next stream.
                    owner.channels.pop(channel.feed.name, None)
                    for stream in owner.streams:
                        if stream.feed is channel.feed:
                            stream.end(error.code)
                    return
            channel.add(changes)
            more = changes.more
            for stream in owner.streams:
                stream.wake()

    def _note(self, error: Exception | None) -> None:
        if error is not None and not self._failing:
            logger.warning("changes cannot be looked for, so live updates wait: %s", type(error).__name__)
        elif error is None and self._failing:
            logger.info("live updates go on")
        self._failing = error is not None


class Stream(Response):
    """Events of one reader, from before the first byte to the last.

    What is refused is refused as ever: 410 and 422 for the last id, 429 for too many streams.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, database: Database, feed: Feed, last_event_id: str | None) -> None:
        state = request.state
        self.status_code, self.background = 200, None
        self.init_headers({"X-Accel-Buffering": "no"})  # for nginx, which else collects what comes
        self.feed = feed
        self.issued_at: float = state.principal.issued_at
        self._seconds: float = state.bearer.verifier.seconds_left(state.principal)
        self._live: Live = state.live
        self._owner_id: UUID = state.user.id
        self._database = database
        self._last_event_id = last_event_id
        self._news = asyncio.Event()
        self._ended: str | None = None
        self._writer: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """There may be something new."""
        self._news.set()

    def end(self, reason: str) -> None:
        """Say why, and close. Who does not read that soon is not waited for."""
        if self._ended is None:
            self._ended = reason
            self._news.set()
            if self._writer is not None:
                asyncio.get_running_loop().call_later(GRACE, self._writer.cancel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner = self._live.join(self, self._owner_id)
        expiry = asyncio.get_running_loop().call_later(self._seconds, self.end, "token_expired")
        try:
            since, first = await self._begin()
            self._channel = self._live.channel(owner, self.feed, first.head)
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
            self._live.leave(self, owner)
        if not self._writer.cancelled():
            self._writer.result()

    async def _begin(self) -> tuple[Position, Changes]:
        """Where the reader is, and what is there: from now on, unless the last id says where."""
        if self._last_event_id is None:
            first = await self.feed.now(self._database)
            return first.next, first
        since = Position.decode(self._last_event_id, self.feed.name, "header", "Last-Event-ID")
        return since, await self.feed.after(self._database, since, PAGE)

    async def _write(self, send: Send, position: Position, first: Changes) -> None:
        async def put(events: list[bytes], *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        retry = int(1000 * random.uniform(*RETRY))  # noqa: S311  # nothing to guess
        # An id before the first event, so that nothing is lost of a stream that breaks before it.
        events = [f"retry: {retry}\nid: {position.encode(self.feed.name)}\n\n".encode()]
        events += [self.feed.event(*item) for item in first.items]
        position = first.next
        while self._ended is None:
            await put(events)
            events = []
            while not events and self._ended is None:
                self._news.clear()
                events, position = await self._following(position)
                if not events and not await self._news_come():
                    events = [b":\n\n"]
        await put([f'event: end\ndata: {{"reason": "{self._ended}"}}\n\n'.encode()], more=False)

    async def _following(self, position: Position) -> tuple[list[bytes], Position]:
        """What comes after a position, and the position after that."""
        events = self._channel.after(position)
        if events is not None:
            return events, max(position, self._channel.end, key=lambda each: each.place)
        try:
            changes = await self.feed.after(self._database, position, PAGE)
        except SyncTokenExpired as error:
            self.end(error.code)
        except psycopg.Error:
            await asyncio.sleep(self._live.period)  # the database is away: it is asked again
            self._news.set()
        else:
            return [self.feed.event(*item) for item in changes.items], changes.next
        return [], position

    async def _news_come(self) -> bool:
        try:
            async with asyncio.timeout(self._live.heartbeat):
                await self._news.wait()
        except TimeoutError:
            return False
        return True


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
