"""Delta sync: what changed since a token, in the order of commits, with tombstones, so that a copy misses nothing.

Triggers (migration 0006) give all that a transaction changes of one owner the next number `n`, under a lock that is
held until it commits. So who has seen a number has seen all before it, however late they were committed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Table,
    Uuid,
    and_,
    bindparam,
    func,
    literal_column,
    or_,
    true,
    tuple_,
)
from sqlmodel import Field as ColumnField
from sqlmodel import SQLModel, col, select

from backend.database import Cost, Database, Row, Statement, Transaction
from backend.resources import pagination, responses
from backend.resources.models import CALLER, FIRST, LAST, RETENTION, turn
from backend.resources.responses import Answer
from backend.resources.types import Digits
from backend.web.problems import DomainError

T = TypeVar("T")

LARGEST = 2**63 - 1

# Shown in the API's description.
EXAMPLE = (
    "WyJ0YXNrcyIsNDIsImZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmIiwwLCIwMTlhOWQ0ZTdiMWM3ZDIwOWYwZTZhMWIyYzNkNGU1ZiJd"
)


class ChangeCounter(SQLModel, table=True):
    """The last number that was taken for an owner's rows, and the last one of which the purge has left nothing."""

    __tablename__ = "change_counters"
    __table_args__ = ({"info": {"bookkeeping": True}},)

    owner_id: UUID = ColumnField(primary_key=True, foreign_key="users.id", ondelete="CASCADE")
    n: int = ColumnField(sa_type=BigInteger, sa_column_kwargs={"server_default": literal_column("0")})
    purged: int = ColumnField(sa_type=BigInteger, sa_column_kwargs={"server_default": literal_column("0")})


# For who reads before the write: a statement of its own, so that the next one sees what the writer before has done.
AWAIT_TURN = Statement(select(func.pg_advisory_xact_lock(turn(CALLER))), writes=True)


class SyncTokenExpired(DomainError):
    """What was deleted since then is forgotten: start anew, without a token."""

    status, code = 410, "sync_token_expired"


class InvalidSyncToken(DomainError):
    """This is no sync token of this feed's."""

    status, code = 422, "invalid_sync_token"

    def __init__(self, *loc: str) -> None:
        super().__init__()
        self.errors = ({"loc": list(loc), "msg": "Start again without it", "type": self.code},)


class Position(NamedTuple):
    """A place in one owner's feed: all up to the row `id` of the number `n` has been seen.

    `start`: the number that there was when the copy was begun. Of a row that was deleted before, it has never known.
    """

    n: int
    id: UUID
    start: int
    owner: UUID

    @property
    def place(self) -> tuple[int, UUID]:
        """What orders positions."""
        return self.n, self.id

    def encode(self, feed: str) -> str:
        return pagination.pack([feed, self.n, self.id.hex, self.start, self.owner.hex])

    @classmethod
    def decode(cls, token: str, feed: str, *loc: str) -> "Position":
        """`loc`: where the token stood. It needs no signature: every statement is scoped to its caller."""
        try:
            made_for, n, id, start, owner = pagination.unpack(token)
            if made_for != feed or not all(type(n) is int and 0 <= n <= LARGEST for n in (n, start)):
                raise InvalidSyncToken(*loc)
            return cls(n, UUID(id), start, UUID(owner))
        except (ValueError, TypeError, AttributeError):
            raise InvalidSyncToken(*loc) from None


class ChangesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    since: str | None = Field(
        default=None,
        max_length=300,
        description="`next` of the last answer. Without it everything is new.",
        examples=[EXAMPLE],
    )
    limit: Digits = Field(default=100, ge=1, le=100, description="How many at once.", examples=[50])


class ChangePage(BaseModel, Generic[T]):
    items: list[T] = Field(description="Each row once, as it is now, the last change last; `deleted_at`: it is gone.")
    next: str = Field(
        description="Pass it as `since` to go on from here: at once if there is `more`, else any time.",
        examples=[EXAMPLE],
    )
    more: bool = Field(description="Whether there was more at that moment than `limit`.")


@dataclass(frozen=True, slots=True)
class Changes:
    """Rows with the positions behind them, where to go on, and behind all that has been committed."""

    items: Sequence[tuple[Position, Row]]
    next: Position
    more: bool
    head: Position


def statement(table: Table, read: Sequence[Any]) -> Statement:
    """The rows of `table` behind a position, and how far the owner's numbers go: of one moment, in one statement.

    There is always a row to carry the numbers; one without an id carries nothing else. What has been in the bin for
    `RETENTION` counts as purged, whether the purge has run or not.
    """
    mine, expired = table.c.owner_id == CALLER, table.c.deleted_at <= func.now() - RETENTION
    zero: ColumnElement[int] = literal_column("0")
    lost = select(func.max(table.c.n)).where(mine, expired).scalar_subquery()
    counter = (
        select(
            CALLER.label("owner"),
            func.coalesce(func.max(col(ChangeCounter.n)), zero).label("head"),
            func.greatest(func.max(col(ChangeCounter.purged)), lost, zero).label("purged"),
        )
        .where(col(ChangeCounter.owner_id) == CALLER)
        .cte("counter")
    )
    head = select(counter.c.head).scalar_subquery()
    behind = tuple_(bindparam("after_n", type_=BigInteger), bindparam("after_id", type_=Uuid))
    fresh = and_(
        table.c.deleted_at > func.now() - RETENTION,
        table.c.n > func.coalesce(bindparam("start", type_=BigInteger), head),
    )
    columns: list[Any] = [*read, table.c.n]
    page = (
        select(*columns)
        .where(mine, tuple_(table.c.n, table.c.id) > behind, or_(table.c.deleted_at.is_(None), fresh))
        .order_by(table.c.n, table.c.id)
        .limit(bindparam("limit", type_=Integer))
        .subquery("page")
    )
    told: list[Any] = [*counter.c, *page.c]
    query = select(*told).select_from(counter.outerjoin(page, true()))
    return Statement(query.order_by(page.c.n, page.c.id))


class Feed:
    """The changes of one resource: `name` is that of its table, `event` that of its live events."""

    def __init__(self, name: str, event: str, model: type[BaseModel], statement: Statement) -> None:
        self.name = name
        self._event = event
        self._statement = statement
        self._copying = statement.at(Cost.long)
        self._one, self._many = Answer(model), Answer(model, many=True)

    async def answer(self, database: Database | Transaction, query: ChangesQuery) -> Response:
        since = None if query.since is None else Position.decode(query.since, self.name, "query", "since")
        changes = await self.after(database, since, query.limit)
        items = [row for _, row in changes.items]
        return self._many({"items": items, "next": changes.next.encode(self.name), "more": changes.more})

    async def after(self, database: Database | Transaction, since: Position | None, limit: int) -> Changes:
        """At most `limit` rows behind a position; None: what there is, from the first. Raises SyncTokenExpired."""
        return await self._read(database, since, since.place if since else (0, FIRST), limit)

    async def now(self, database: Database | Transaction) -> Changes:
        """Nothing, and where all that has been committed ends."""
        return await self._read(database, None, (LARGEST, LAST), 0)

    async def _read(
        self, database: Database | Transaction, since: Position | None, after: tuple[int, UUID], limit: int
    ) -> Changes:
        start = since.start if since else None
        # A first copy reads everything there is, page after page.
        copies = limit > 0 and (since is None or since.n < since.start)
        statement = self._copying if copies else self._statement
        rows = await database.rows(statement, after_n=after[0], after_id=after[1], start=start, limit=limit + 1)
        owner, head, purged = (rows[0][name] for name in ("owner", "head", "purged"))
        # A number that is not taken yet is one of a database that was set back since.
        if since and (since.owner != owner or not purged <= max(since.n, since.start) <= head):
            raise SyncTokenExpired
        end = Position(head, LAST, head if start is None else start, owner)
        found = [row for row in rows if row["id"]]
        items = [(end._replace(n=row["n"], id=row["id"]), row) for row in found[:limit]]
        more = len(found) > limit
        return Changes(items, items[-1][0] if more else end, more, end)

    def event(self, position: Position, row: Row) -> bytes:
        """One row as a server-sent event."""
        data = responses.to_json(self._one.members(row))
        return b"event: %s\nid: %s\ndata: %s\n\n" % (self._event.encode(), position.encode(self.name).encode(), data)
