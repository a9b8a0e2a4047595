"""Statements that delete or transfer all data of a user, generated for every table that has an `owner_id`.

Tables and columns with `info={"bookkeeping": True}` count or order other rows; they are not exported or transferred.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, ColumnElement, ForeignKeyConstraint, FromClause, Table, UniqueConstraint, select
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import SQLModel

from backend.database import Statement

USER, OLD, NEW = (sa.bindparam(name, type_=sa.Uuid) for name in ("user_id", "old_id", "new_id"))
ONE: ColumnElement[int] = sa.literal_column("1")


def is_bookkeeping(item: Table | Column[Any]) -> bool:
    """Whether it contains no data of a user."""
    return bool(item.info.get("bookkeeping"))


@lru_cache(1)
def tables() -> Sequence[Table]:
    """All owned tables, referenced ones first."""
    return [table for table in SQLModel.metadata.sorted_tables if "owner_id" in table.c]


@lru_cache(1)
def deletions() -> Sequence[Statement]:
    """Delete all data of the parameter `user_id`, bookkeeping last.

    Link tables are left to ON DELETE CASCADE where possible: deleting a link first would update its parent row.
    """
    last_first = list(reversed(tables()))
    last_first.sort(key=lambda table: (is_bookkeeping(table), _is_cascading_link(table)))
    return [Statement(sa.delete(table).where(table.c.owner_id == USER)) for table in last_first]


@lru_cache(1)
def transfers() -> Sequence[Statement]:
    """Copy all data of the parameter `old_id` to `new_id`; `deletions` then removes the originals.

    Both user rows must be locked. Of two rows with the same id the later change wins, in a tie the old user's; without
    `updated_at`, the new user's. A row that would violate a unique key of the new user, such as a tag with an equal
    name, is replaced by the existing row, and references to it follow. A copied row gets a new version.
    """
    transfers = [Transfer(table) for table in tables() if not is_bookkeeping(table)]
    bookkeeping_first = sorted(tables(), key=is_bookkeeping, reverse=True)
    return [*map(_lock, bookkeeping_first), *(statement for each in transfers for statement in each.statements())]


def _lock(table: Table) -> Statement:
    """Lock the rows, in the order in which other writers of one owner do: bookkeeping first."""
    owner = table.c.owner_id
    of = sa.or_(owner == OLD, owner == NEW) if is_bookkeeping(table) else owner == OLD
    locked = select(ONE).select_from(table).where(of).with_for_update().subquery()
    return Statement(select(sa.func.count()).select_from(locked))


class Transfer:
    """The statements that copy the rows of one table from the old user (`source`) to the new one (`target`)."""

    def __init__(self, table: Table) -> None:
        self.target = table
        self.source = table.alias("source")
        self.columns = [c for c in table.c if c.computed is None and c.name != "owner_id" and not is_bookkeeping(c)]
        self.key = [column for column in table.primary_key if column.name != "owner_id"]
        self.uniques = list(_uniques(table))
        references = [(c, key) for key in table.foreign_key_constraints for c in key.columns if c.name != "owner_id"]
        self.parents = dict(references)
        # A link has no data of its own. It belongs to the parent that has an `updated_at`.
        self.is_link = all(column in self.parents for column in self.columns)

    def statements(self) -> Iterator[Statement]:
        if "updated_at" in self.target.c:
            yield self._overwrite_older()
        values = {column.name: self._value(column) for column in self.columns}
        rows = select(NEW, *values.values()).where(self.source.c.owner_id == OLD)
        if self.is_link:
            for key in self.parents.values():
                if "updated_at" in key.referred_table.c:
                    is_new = self.target.c.owner_id == NEW
                    yield Statement(sa.delete(self.target).where(is_new, _is_overwritten(key, self.target)))
                    rows = rows.where(_is_overwritten(key, self.source))
        yield Statement(insert(self.target).from_select(["owner_id", *values], rows).on_conflict_do_nothing())

    def _overwrite_older(self) -> Statement:
        target, source = self.target, self.source
        values = {column.name: self._value(column) for column in self.columns if column not in self.key}
        if "version" in values:
            values["version"] = sa.func.greatest(target.c.version, source.c.version) + 1
        uniques = {name for unique in self.uniques for name in unique}
        return Statement(
            sa.update(target)
            .where(target.c.owner_id == NEW, source.c.owner_id == OLD)
            .where(*(target.c[column.name] == source.c[column.name] for column in self.key))
            .where(source.c.updated_at >= target.c.updated_at)
            # A changed unique value could collide with a third row.
            .where(*(target.c[name].is_not_distinct_from(source.c[name]) for name in sorted(uniques)))
            .values(values)
        )

    def _value(self, column: Column[Any]) -> ColumnElement[Any]:
        """The value of the copied row: incremented for a version, and for a reference the new user's matching row."""
        value: ColumnElement[Any] = self.source.c[column.name]
        if column.name == "version":
            return value + 1
        reference = self.parents.get(column)
        if reference is None or not (uniques := list(_uniques(reference.referred_table))):
            return value
        (key,) = (element.column for element in reference.elements if element.parent is column)
        same, equal, old = (reference.referred_table.alias() for _ in range(3))
        is_equal = sa.or_(*(sa.and_(*(equal.c[name] == old.c[name] for name in unique)) for unique in uniques))
        by_id = select(same.c[key.name]).where(same.c.owner_id == NEW, same.c[key.name] == value)
        by_unique_key = (
            select(equal.c[key.name])
            .join_from(old, equal, is_equal)
            .where(old.c.owner_id == OLD, old.c[key.name] == value, equal.c.owner_id == NEW)
            .limit(1)
        )
        return sa.func.coalesce(by_id.scalar_subquery(), by_unique_key.scalar_subquery(), value)


def _is_cascading_link(table: Table) -> bool:
    """Whether the table only links two others and its rows are deleted with either of them."""
    ends = [key for key in table.foreign_key_constraints if len(key.columns) > 1]
    linked = {column.name for key in ends for column in key.columns}
    return linked == set(table.c.keys()) and all(key.ondelete == "CASCADE" for key in ends)


def _is_overwritten(reference: ForeignKeyConstraint, links: FromClause) -> ColumnElement[bool]:
    """For a link: whether the parent row of the new user now equals that of the old one."""
    parent = reference.referred_table
    new, old = parent.alias(), parent.alias()
    pairs = [(each.parent.name, each.column.name) for each in reference.elements if each.parent.name != "owner_id"]
    return sa.exists(
        select(ONE)
        .select_from(new.join(old, sa.and_(*(new.c[referred] == old.c[referred] for _, referred in pairs))))
        .where(new.c.owner_id == NEW, old.c.owner_id == OLD, new.c.updated_at == old.c.updated_at)
        .where(*(old.c[referred] == links.c[child] for child, referred in pairs))
        .correlate(links)
    )


def _uniques(table: Table) -> Iterator[tuple[str, ...]]:
    """The columns of each unique key except the primary one, without `owner_id`."""
    for item in (*table.constraints, *table.indexes):
        if isinstance(item, UniqueConstraint) or (isinstance(item, sa.Index) and item.unique):
            names = tuple(column.name for column in item.columns if column.name != "owner_id")
            plain = isinstance(item, UniqueConstraint) or len(item.expressions) == len(item.columns)
            if not plain or item.dialect_options["postgresql"].get("where") is not None:
                raise TypeError(f"{item.name}: merging supports no unique index on expressions or with a condition")
            yield names
