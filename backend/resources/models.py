"""What every table that belongs to users has in common, and the parts of its statements that are always the same."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    DateTime,
    Function,
    Integer,
    Table,
    Uuid,
    bindparam,
    case,
    false,
    func,
    literal_column,
    or_,
    text,
    tuple_,
)
from sqlmodel import Field, SQLModel

# Filled in by the executor: the id of whoever the statement runs as.
CALLER = bindparam("caller", type_=Uuid)

# How long deleted rows are kept as tombstones, for sync clients and the trash.
RETENTION: ColumnElement[timedelta] = literal_column("interval '30 days'")

# The lowest and the highest id.
FIRST, LAST = UUID(int=0), UUID(int=2**128 - 1)

_VERSIONS = bindparam("if_match", type_=ARRAY(Integer))


class Owned(SQLModel):
    """The key leads with the owner: an id is unique per owner, so clients may choose it and learn nothing of others."""

    owner_id: UUID = Field(primary_key=True, foreign_key="users.id", ondelete="CASCADE")
    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    version: int = Field(sa_column_kwargs={"server_default": text("1")})
    created_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})


class Synced(Owned):
    """Part of a feed of changes. Its migration calls `number`; rows are marked as deleted, and removed by the purge."""

    n: int = Field(sa_type=BigInteger)
    deleted_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))


def tombstoned() -> Sequence[Table]:
    """The tables of all `Synced` models."""
    return [table for table in SQLModel.metadata.sorted_tables if {"n", "deleted_at"} <= set(table.c.keys())]


def turn(owner: ColumnElement[Any]) -> Function[int]:
    """The key of the advisory lock that triggers take before any change of this owner's rows."""
    return func.hashtextextended(func.concat("changes of ", owner), literal_column("0"))


def matches(table: Table) -> ColumnElement[bool]:
    """Whether the version is one of the parameter `if_match`; null allows any."""
    return or_(_VERSIONS.is_(None), table.c.version == func.any(_VERSIONS))


def changes(table: Table, names: Iterable[str], *or_else: ColumnElement[bool]) -> dict[str, Any]:
    """For the `values()` of an update: these columns, from the parameters of their names, and what tells of a change.

    Equal values make no new version, unless one of `or_else` is true.
    """
    new = {name: bindparam(name, type_=table.c[name].type) for name in sorted(names)}
    differs = tuple_(*(table.c[name] for name in new)).is_distinct_from(tuple_(*new.values())) if new else false()
    differs = or_(differs, *or_else)
    return {
        **new,
        "version": table.c.version + case((differs, 1), else_=0),
        # Whoever waited for a lock may have begun before the one who held it.
        "updated_at": case((differs, func.greatest(table.c.updated_at, func.now())), else_=table.c.updated_at),
    }
