"""The broker of live updates: polls for new changes once per worker and keeps recent events for all streams.

One statement per period asks, for all owners with open streams, which change counters have moved and which users may
no longer read. PostgreSQL's NOTIFY is not used: in every write it would take a lock that is global to the server.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Final, Protocol
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, DateTime, Uuid, bindparam, func, literal_column, or_
from sqlmodel import col, select

from backend.database import SYSTEM, Actor, Database, Pool, Row, Statement
from backend.sync.changes import ChangeCounter, Changes, Feed, Position, SyncTokenExpired
from backend.users.models import User, UserStatus
from backend.web.problems import DomainError

logger = logging.getLogger(__name__)

PERIOD: Final = 0.3  # seconds between two polls
HEARTBEAT: Final = 15.0  # seconds
PAGE: Final = 100  # changes per statement
MAX_STREAMS: Final = 20  # of one user in one worker
MAX_CACHED: Final = 64 * 1024  # bytes of events, for one owner and feed
READS_AT_ONCE: Final = 4

_SUBSCRIBED = (
    func.unnest(
        bindparam("owners", type_=ARRAY(Uuid)),
        bindparam("numbers", type_=ARRAY(BigInteger)),
        bindparam("issued", type_=ARRAY(DateTime(timezone=True))),
    )
    .table_valued("owner", "n", "issued", name="subscribed")
    .render_derived()
)
_NUMBER = func.coalesce(col(ChangeCounter.n), literal_column("0"))
_CLOSED = or_(col(User.id).is_(None), col(User.status) != UserStatus.active.value)
POLL = Statement(
    select(
        _SUBSCRIBED.c.owner,
        _NUMBER.label("n"),
        _CLOSED.label("closed"),
        func.date_trunc("second", col(User.tokens_valid_after)).label("floor"),
    )
    .select_from(
        _SUBSCRIBED.outerjoin(User, col(User.id) == _SUBSCRIBED.c.owner).outerjoin(
            ChangeCounter, col(ChangeCounter.owner_id) == _SUBSCRIBED.c.owner
        )
    )
    .where(
        or_(
            _SUBSCRIBED.c.n != _NUMBER,  # lower in a database that was restored from a backup
            _CLOSED,
            func.date_trunc("second", col(User.tokens_valid_after)) >= _SUBSCRIBED.c.issued,
        )
    )
)


class TooManyStreams(DomainError):
    """This account has reached its limit of open event streams. Close one first."""

    status, code = 429, "too_many_streams"


class Subscriber(Protocol):
    """An open stream, as the broker sees it."""

    feed: Feed
    issued_at: float  # `iat` of its token, in unix seconds

    def wake(self) -> None:
        """New events may be available."""

    def end(self, reason: str) -> None:
        """Send the reason to the client and close the stream."""


class Channel:
    """Recent events of one owner's feed: those after the position `start`, up to the position `end`."""

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
        while self._size > MAX_CACHED:
            self.start, event = self._recent.popleft()
            self._size -= len(event)
        self.end = changes.next

    def after(self, position: Position) -> list[bytes] | None:
        """Return the events between a position and `end`; None if some of them are no longer cached."""
        if position.place < self.start.place:
            return None
        return [event for at, event in self._recent if at.place > position.place]


class Owner:
    """A user with open streams in this worker."""

    def __init__(self, id: UUID) -> None:
        self.id = id
        self.streams: set[Subscriber] = set()
        self.channels: dict[str, Channel] = {}

    @property
    def seen(self) -> int:
        """The change number up to which every channel is complete."""
        return min(channel.end.n for channel in self.channels.values())

    @property
    def issued(self) -> datetime:
        """When the oldest token among the streams was issued."""
        return datetime.fromtimestamp(min(stream.issued_at for stream in self.streams), UTC)


class Broker:
    """Connects the streams of this worker to the database, which it polls every `period` seconds while any is open."""

    def __init__(self, pool: Pool, *, period: float = PERIOD, heartbeat: float = HEARTBEAT) -> None:
        self.period = period
        self.heartbeat = heartbeat
        self._pool = pool
        self._owners: dict[UUID, Owner] = {}
        self._has_channels = asyncio.Event()
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
        self._stopping = False
        self._failing = False

    def __len__(self) -> int:
        """Return the number of open streams."""
        return sum(len(owner.streams) for owner in self._owners.values())

    def join(self, stream: Subscriber, id: UUID) -> Owner:
        """Register a stream of the user `id`. Raises TooManyStreams."""
        owner = self._owners.setdefault(id, Owner(id))
        if len(owner.streams) >= MAX_STREAMS:
            raise TooManyStreams
        owner.streams.add(stream)
        if self._stopping:
            stream.end("shutdown")
        return owner

    def channel(self, owner: Owner, feed: Feed, head: Position) -> Channel:
        """Return the owner's channel of a feed. A new one begins at `head`, the end of the feed at that time."""
        self._has_channels.set()
        return owner.channels.setdefault(feed.name, Channel(feed, head))

    def leave(self, stream: Subscriber, owner: Owner) -> None:
        owner.streams.discard(stream)
        for name in set(owner.channels) - {stream.feed.name for stream in owner.streams}:
            del owner.channels[name]
        if not owner.streams:
            del self._owners[owner.id]
        if not self._owners:
            self._has_channels.clear()

    def stop(self) -> None:
        """End all streams, and every stream that is opened from now on, so that clients connect elsewhere."""
        self._stopping = True
        for owner in self._owners.values():
            for stream in owner.streams:
                stream.end("shutdown")

    @asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Poll in the background while entered."""
        task = asyncio.create_task(self._poll_forever(), name="live updates")
        try:
            yield
        finally:
            self.stop()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _poll_forever(self) -> None:
        while True:
            await self._has_channels.wait()
            try:
                await self._poll()
            except Exception as error:  # noqa: BLE001 - outer edge of a background task: log it and poll again
                self._note(error)
            else:
                self._note(None)
            await asyncio.sleep(self.period)

    async def _poll(self) -> None:
        owners = {owner.id: owner for owner in self._owners.values() if owner.channels}
        rows = await Database(self._pool, SYSTEM).rows(
            POLL,
            owners=list(owners),
            numbers=[owner.seen for owner in owners.values()],
            issued=[owner.issued for owner in owners.values()],
        )
        results = await asyncio.gather(
            *(self._update(owners[row["owner"]], row) for row in rows), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _update(self, owner: Owner, row: Row) -> None:
        for stream in owner.streams:
            if row["closed"] or (row["floor"] and stream.issued_at <= row["floor"].timestamp()):
                stream.end("revoked")
        if row["closed"]:
            return
        for channel in list(owner.channels.values()):
            if row["n"] != channel.end.n:
                await self._read(owner, channel)

    async def _read(self, owner: Owner, channel: Channel) -> None:
        """Read the new changes of a channel once, for all its streams."""
        database, more = Database(self._pool, Actor.user(owner.id)), True
        while more:
            async with self._reads:
                try:
                    changes = await channel.feed.after(database, channel.end, PAGE)
                except SyncTokenExpired as error:
                    # Changes were lost, so no event can continue the streams. Their clients start a new sync.
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
            logger.warning("live updates are delayed: polling for changes failed: %s", type(error).__name__)
        elif error is None and self._failing:
            logger.info("live updates recovered")
        self._failing = error is not None
