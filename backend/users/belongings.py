"""Everything that belongs to a user, found through the metadata: every table with an `owner_id`, whoever added it.

A table with `info={"bookkeeping": True}` only counts or orders the rows of others: it is neither shown nor moved, and
neither is a column that says so.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    ForeignKeyConstraint,
    FromClause,
    Index,
    Table,
    UniqueConstraint,
    Uuid,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import SQLModel

from backend.database import Statement

USER, OLD, NEW = (bindparam(name, type_=Uuid) for name in ("user_id", "old_id", "new_id"))
ONE: ColumnElement[int] = literal_column("1")


def is_bookkeeping(item: Table | Column[Any]) -> bool:
    """Whether it is nobody's data."""
    return bool(item.info.get("bookkeeping"))


@lru_cache(1)
def tables() -> Sequence[Table]:
    """Those that others refer to first."""
    return [table for table in SQLModel.metadata.sorted_tables if "owner_id" in table.c]


@lru_cache(1)
def clearing() -> Sequence[Statement]:
    """Delete everything of the parameter `user_id`. What counts the rows of others goes last.

    A link goes with what it links: taken away before, it would first be a change of that, row by row.
    """
    last_first = list(reversed(tables()))
    last_first.sort(key=lambda table: (is_bookkeeping(table), _goes_along(table)))
    return [
        Statement(delete(table).where(table.c.owner_id == bindparam("user_id", type_=Uuid))) for table in last_first
    ]


@lru_cache(1)
def moving() -> Sequence[Statement]:
    """Copy everything of the parameter `old_id` to `new_id`, whose rows are locked; `clearing` then takes the rest.

    The same id in both is the same thing: the row that was changed last wins, or else the one that is there already.
    A row that would be a second one of a unique key, such as a tag of an equal name, becomes the one that is there,
    and what refers to it follows. A row that moves is a new version of it.
    """
    moved = [Moved(table) for table in tables() if not is_bookkeeping(table)]
    first_counters = sorted(tables(), key=is_bookkeeping, reverse=True)
    return [*map(_lock, first_counters), *(statement for table in moved for statement in table.statements())]


def _lock(table: Table) -> Statement:
    """Writers of one owner take the counter first, and what they change later: so does this."""
    owner = table.c.owner_id
    of = or_(owner == OLD, owner == NEW) if is_bookkeeping(table) else owner == OLD
    locked = select(ONE).select_from(table).where(of).with_for_update().subquery()
    return Statement(select(func.count()).select_from(locked))


class Moved:
    """How the rows of one table get another owner. Theirs is `there`, and the one who has moved is `source`."""

    def __init__(self, table: Table) -> None:
        self.there = table
        self.source = table.alias("source")
        self.columns = [c for c in table.c if c.computed is None and c.name != "owner_id" and not is_bookkeeping(c)]
        self.key = [column for column in table.primary_key if column.name != "owner_id"]
        self.uniques = list(_uniques(table))
        references = [(c, key) for key in table.foreign_key_constraints for c in key.columns if c.name != "owner_id"]
        self.parents = dict(references)
        # It says nothing but that two belong together, and so is a part of the one that has a time of change.
        self.is_link = all(column in self.parents for column in self.columns)

    def statements(self) -> Iterator[Statement]:
        if "updated_at" in self.there.c:
            yield self._overtake()
        values = {column.name: self._moved(column) for column in self.columns}
        rows = select(NEW, *values.values()).where(self.source.c.owner_id == OLD)
        if self.is_link:
            for key in self.parents.values():
                if "updated_at" in key.referred_table.c:
                    theirs = self.there.c.owner_id == NEW
                    yield Statement(delete(self.there).where(theirs, _taken_over(key, self.there)))
                    rows = rows.where(_taken_over(key, self.source))
        yield Statement(insert(self.there).from_select(["owner_id", *values], rows).on_conflict_do_nothing())

    def _overtake(self) -> Statement:
        there, source = self.there, self.source
        values = {column.name: self._moved(column) for column in self.columns if column not in self.key}
        if "version" in values:
            values["version"] = func.greatest(there.c.version, source.c.version) + 1
        uniques = {name for unique in self.uniques for name in unique}
        return Statement(
            update(there)
            .where(there.c.owner_id == NEW, source.c.owner_id == OLD)
            .where(*(there.c[column.name] == source.c[column.name] for column in self.key))
            .where(source.c.updated_at >= there.c.updated_at)
            # It may not come to be a second one of what a third row is already.
            .where(*(there.c[name].is_not_distinct_from(source.c[name]) for name in sorted(uniques)))
            .values(values)
        )

    def _moved(self, column: Column[Any]) -> ColumnElement[Any]:
        """The value of a column of the source as it stands in the new owner's row."""
        value: ColumnElement[Any] = self.source.c[column.name]
        if column.name == "version":
            return value + 1
        reference = self.parents.get(column)
        if reference is None or not (uniques := list(_uniques(reference.referred_table))):
            return value
        (target,) = (element.column for element in reference.elements if element.parent is column)
        same, twin, was = (reference.referred_table.alias() for _ in range(3))
        equal = or_(*(and_(*(twin.c[name] == was.c[name] for name in unique)) for unique in uniques))
        by_id = select(same.c[target.name]).where(same.c.owner_id == NEW, same.c[target.name] == value)
        by_name = (
            select(twin.c[target.name])
            .join_from(was, twin, equal)
            .where(was.c.owner_id == OLD, was.c[target.name] == value, twin.c.owner_id == NEW)
            .limit(1)
        )
        return func.coalesce(by_id.scalar_subquery(), by_name.scalar_subquery(), value)


def _goes_along(table: Table) -> bool:
    """Whether it is a link that is deleted with either end."""
    ends = [key for key in table.foreign_key_constraints if len(key.columns) > 1]
    linked = {column.name for key in ends for column in key.columns}
    return linked == set(table.c.keys()) and all(key.ondelete == "CASCADE" for key in ends)


def _taken_over(reference: ForeignKeyConstraint, links: FromClause) -> ColumnElement[bool]:
    """For a link: whether what it refers to is now as it was at the source."""
    parent = reference.referred_table
    now, was = parent.alias(), parent.alias()
    pairs = [(element.parent.name, element.column.name) for element in reference.elements]
    pairs = [(mine, its) for mine, its in pairs if mine != "owner_id"]
    return exists(
        select(ONE)
        .select_from(now.join(was, and_(*(now.c[its] == was.c[its] for _, its in pairs))))
        .where(now.c.owner_id == NEW, was.c.owner_id == OLD, now.c.updated_at == was.c.updated_at)
        .where(*(was.c[its] == links.c[mine] for mine, its in pairs))
        .correlate(links)
    )


def _uniques(table: Table) -> Iterator[tuple[str, ...]]:
    """What no owner has twice beside the id, without the owner."""
    for item in (*table.constraints, *table.indexes):
        if isinstance(item, UniqueConstraint) or (isinstance(item, Index) and item.unique):
            names = tuple(column.name for column in item.columns if column.name != "owner_id")
            plain = isinstance(item, UniqueConstraint) or len(item.expressions) == len(item.columns)
            if not plain or item.dialect_options["postgresql"].get("where") is not None:
                raise TypeError(f"{item.name} is unique in a way that a merge does not know: make it a constraint")
            yield names
