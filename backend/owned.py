"""What every table that belongs to users has in common, and the parts of its statements that are always the same."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    DateTime,
    Integer,
    Table,
    Uuid,
    bindparam,
    case,
    false,
    func,
    or_,
    text,
    tuple_,
)
from sqlmodel import Field, SQLModel

# Filled in by the executor: the id of whoever the statement runs as.
CALLER = bindparam("caller", type_=Uuid)

_VERSIONS = bindparam("if_match", type_=ARRAY(Integer))


class Owned(SQLModel):
    """The key leads with the owner: an id is unique per owner, so clients may choose it and learn nothing of others."""

    owner_id: UUID = Field(primary_key=True, foreign_key="users.id", ondelete="CASCADE")
    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    version: int = Field(sa_column_kwargs={"server_default": text("1")})
    created_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})


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
