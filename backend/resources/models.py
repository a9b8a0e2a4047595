"""Columns of tables whose rows belong to users, and shared parts of their statements."""

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

# Set by the executor to the id of the user that the statement runs as.
CALLER = bindparam("caller", type_=Uuid)

# How long deleted rows are kept as tombstones, for sync clients and the trash.
RETENTION: ColumnElement[timedelta] = literal_column("interval '30 days'")

# The lowest and the highest id.
FIRST, LAST = UUID(int=0), UUID(int=2**128 - 1)

_VERSIONS = bindparam("if_match", type_=ARRAY(Integer))


class Owned(SQLModel):
    """Primary keys are `(owner_id, id)`: clients may choose ids, and another user's id reveals nothing."""

    owner_id: UUID = Field(primary_key=True, foreign_key="users.id", ondelete="CASCADE")
    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    version: int = Field(sa_column_kwargs={"server_default": text("1")})
    created_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})


class Synced(Owned):
    """Part of a feed of changes. Its migration calls `number`; deleted rows are tombstones until the purge."""

    n: int = Field(sa_type=BigInteger)
    deleted_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))


def tombstoned() -> Sequence[Table]:
    """The tables of all `Synced` models."""
    return [table for table in SQLModel.metadata.sorted_tables if {"n", "deleted_at"} <= set(table.c.keys())]


def changes_lock(owner: ColumnElement[Any]) -> Function[int]:
    """The key of the advisory lock that triggers take before any change of this owner's rows."""
    return func.hashtextextended(func.concat("changes of ", owner), literal_column("0"))


def matches(table: Table) -> ColumnElement[bool]:
    """Whether the version is in the parameter `if_match`; null matches any version."""
    return or_(_VERSIONS.is_(None), table.c.version == func.any(_VERSIONS))


def changes(
    table: Table, names: Iterable[str], *or_else: ColumnElement[bool], **instead: ColumnElement[Any]
) -> dict[str, Any]:
    """The `values()` of an update: the columns `names`, from parameters of these names, and version and time.

    Unchanged values make no new version, unless one of `or_else` is true. `instead`: expressions to use instead of the
    parameters of these names.
    """
    new = {name: instead.get(name, bindparam(name, type_=table.c[name].type)) for name in sorted(names)}
    differs = tuple_(*(table.c[name] for name in new)).is_distinct_from(tuple_(*new.values())) if new else false()
    differs = or_(differs, *or_else)
    return {
        **new,
        "version": table.c.version + case((differs, 1), else_=0),
        # A transaction that waited for a lock may have begun before the one that held it.
        "updated_at": case((differs, func.greatest(table.c.updated_at, func.now())), else_=table.c.updated_at),
    }
