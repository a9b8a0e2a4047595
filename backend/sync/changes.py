"""Delta sync: changes since a sync token, in commit order, including deletions.

Triggers give all changes of an owner in one transaction the next change number `n`, under an advisory lock held until
the commit. A client that has seen a number has therefore seen all lower numbers.
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
from backend.resources.models import CALLER, FIRST, LAST, RETENTION, changes_lock
from backend.resources.responses import Answer
from backend.resources.types import Digits
from backend.web.problems import DomainError

T = TypeVar("T")

LARGEST = 2**63 - 1

# A sync token, for OpenAPI.
EXAMPLE = (
    "WyJ0YXNrcyIsNDIsImZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmIiwwLCIwMTlhOWQ0ZTdiMWM3ZDIwOWYwZTZhMWIyYzNkNGU1ZiJd"
)


class ChangeCounter(SQLModel, table=True):
    """The last change number of an owner (`n`), and the highest one among purged rows (`purged`)."""

    __tablename__ = "change_counters"
    __table_args__ = ({"info": {"bookkeeping": True}},)

    owner_id: UUID = ColumnField(primary_key=True, foreign_key="users.id", ondelete="CASCADE")
    n: int = ColumnField(sa_type=BigInteger, sa_column_kwargs={"server_default": literal_column("0")})
    purged: int = ColumnField(sa_type=BigInteger, sa_column_kwargs={"server_default": literal_column("0")})


# Taken before a transaction reads what it will change. A separate statement, so that the next one sees the changes of
# the previous holder.
LOCK_CHANGES = Statement(select(func.pg_advisory_xact_lock(changes_lock(CALLER))), writes=True)


async def write_in_turn(database: Database | Transaction, statement: Statement, **values: object) -> Row | None:
    """Run a statement that writes several rows or tables, and return its first row. Takes `LOCK_CHANGES` first."""

    async def work(transaction: Transaction) -> Row | None:
        await transaction.rows(LOCK_CHANGES)
        return await transaction.row(statement, **values)

    return await (work(database) if isinstance(database, Transaction) else database.transact(work))


class SyncTokenExpired(DomainError):
    """This sync token is too old. Start a new sync without `since`."""

    status, code = 410, "sync_token_expired"


class InvalidSyncToken(DomainError):
    """The sync token is invalid or belongs to another feed."""

    status, code = 422, "invalid_sync_token"

    def __init__(self, *loc: str) -> None:
        super().__init__()
        self.errors = ({"loc": list(loc), "msg": "Start again without a token", "type": self.code},)


class Position(NamedTuple):
    """A position in the feed of an owner: the client has seen everything up to the row `id` with the number `n`.

    `start`: the last number when the sync began. The client has never seen rows that were deleted earlier.
    """

    n: int
    id: UUID
    start: int
    owner: UUID

    @property
    def place(self) -> tuple[int, UUID]:
        """The sort key of positions."""
        return self.n, self.id

    def encode(self, feed: str) -> str:
        return pagination.pack([feed, self.n, self.id.hex, self.start, self.owner.hex])

    @classmethod
    def decode(cls, token: str, feed: str, *loc: str) -> "Position":
        """Raises InvalidSyncToken with `loc`. A token needs no signature: every statement is scoped to the caller."""
        try:
            feed_name, n, id, start, owner = pagination.unpack(token)
            if feed_name != feed or not all(type(n) is int and 0 <= n <= LARGEST for n in (n, start)):
                raise InvalidSyncToken(*loc)
            return cls(n, UUID(id), start, UUID(owner))
        except (ValueError, TypeError, AttributeError):
            raise InvalidSyncToken(*loc) from None


class ChangesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    since: str | None = Field(
        default=None,
        max_length=300,
        description="`next` of the previous response. Without it, all resources are returned.",
        examples=[EXAMPLE],
    )
    limit: Digits = Field(default=100, ge=1, le=100, description="Maximum number of items.", examples=[50])


class ChangePage(BaseModel, Generic[T]):
    items: list[T] = Field(
        description="Changed resources in their current state, by commit order; deleted ones have `deleted_at`."
    )
    next: str = Field(
        description="Value of `since` for the next request: at once if `more` is true, else at any time.",
        examples=[EXAMPLE],
    )
    more: bool = Field(description="Whether there are more changes than `limit`.")


@dataclass(frozen=True, slots=True)
class Changes:
    """Rows with their positions, the position to continue from (`next`) and the end of the feed (`head`)."""

    items: Sequence[tuple[Position, Row]]
    next: Position
    more: bool
    head: Position


def statement(table: Table, read: Sequence[Any]) -> Statement:
    """Select the rows of `table` after a position, and the owner's change numbers, from one snapshot.

    Every row contains the numbers; if there are no changes, one row without an id does. Rows deleted more than
    `RETENTION` ago count as purged, even if the purge has not run.
    """
    mine, expired = table.c.owner_id == CALLER, table.c.deleted_at <= func.now() - RETENTION
    zero: ColumnElement[int] = literal_column("0")
    expired_number = select(func.max(table.c.n)).where(mine, expired).scalar_subquery()
    counter = (
        select(
            CALLER.label("owner"),
            func.coalesce(func.max(col(ChangeCounter.n)), zero).label("head"),
            func.greatest(func.max(col(ChangeCounter.purged)), expired_number, zero).label("purged"),
        )
        .where(col(ChangeCounter.owner_id) == CALLER)
        .cte("counter")
    )
    head = select(counter.c.head).scalar_subquery()
    position = tuple_(bindparam("after_n", type_=BigInteger), bindparam("after_id", type_=Uuid))
    fresh = and_(
        table.c.deleted_at > func.now() - RETENTION,
        table.c.n > func.coalesce(bindparam("start", type_=BigInteger), head),
    )
    columns: list[Any] = [*read, table.c.n]
    page = (
        select(*columns)
        .where(mine, tuple_(table.c.n, table.c.id) > position, or_(table.c.deleted_at.is_(None), fresh))
        .order_by(table.c.n, table.c.id)
        .limit(bindparam("limit", type_=Integer))
        .subquery("page")
    )
    result: list[Any] = [*counter.c, *page.c]
    query = select(*result).select_from(counter.outerjoin(page, true()))
    return Statement(query.order_by(page.c.n, page.c.id))


class Feed:
    """The changes of one resource. `name`: its table; `event`: the name of its live events."""

    def __init__(self, name: str, event: str, model: type[BaseModel], statement: Statement) -> None:
        self.name = name
        self._event = event
        self._statement = statement
        self._full_sync = statement.at(Cost.long)
        self._one, self._many = Answer(model), Answer(model, many=True)

    async def answer(self, database: Database | Transaction, query: ChangesQuery) -> Response:
        since = None if query.since is None else Position.decode(query.since, self.name, "query", "since")
        changes = await self.after(database, since, query.limit)
        items = [row for _, row in changes.items]
        return self._many({"items": items, "next": changes.next.encode(self.name), "more": changes.more})

    async def after(self, database: Database | Transaction, since: Position | None, limit: int) -> Changes:
        """At most `limit` rows after a position; all rows from the first for None. Raises SyncTokenExpired."""
        return await self._read(database, since, since.place if since else (0, FIRST), limit)

    async def now(self, database: Database | Transaction) -> Changes:
        """No rows, and the end of the feed."""
        return await self._read(database, None, (LARGEST, LAST), 0)

    async def _read(
        self, database: Database | Transaction, since: Position | None, after: tuple[int, UUID], limit: int
    ) -> Changes:
        start = since.start if since else None
        # A full sync reads all rows, page by page.
        is_full = limit > 0 and (since is None or since.n < since.start)
        statement = self._full_sync if is_full else self._statement
        rows = await database.rows(statement, after_n=after[0], after_id=after[1], start=start, limit=limit + 1)
        owner, head, purged = (rows[0][name] for name in ("owner", "head", "purged"))
        # A number above `head` comes from before a restore of the database.
        if since and (since.owner != owner or not purged <= max(since.n, since.start) <= head):
            raise SyncTokenExpired
        end = Position(head, LAST, head if start is None else start, owner)
        present = [row for row in rows if row["id"]]
        items = [(end._replace(n=row["n"], id=row["id"]), row) for row in present[:limit]]
        more = len(present) > limit
        return Changes(items, items[-1][0] if more else end, more, end)

    def event(self, position: Position, row: Row) -> bytes:
        """One row as a server-sent event."""
        data = responses.to_json(self._one.members(row))
        return b"event: %s\nid: %s\ndata: %s\n\n" % (self._event.encode(), position.encode(self.name).encode(), data)
