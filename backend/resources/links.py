"""Many-to-many: rows that show the names of labels of the same owner, such as the tags of tasks."""

import re
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator
from pydantic import Field as MemberField
from sqlalchemy import (
    ARRAY,
    CheckConstraint,
    Column,
    ColumnElement,
    Computed,
    ForeignKeyConstraint,
    Index,
    Insert,
    Select,
    Table,
    Text,
    UniqueConstraint,
    Update,
    Uuid,
    and_,
    bindparam,
    collate,
    delete,
    exists,
    func,
    inspect,
    select,
    text,
    true,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.base import RESERVED_WORDS
from sqlalchemy.orm import declared_attr
from sqlmodel import Field, SQLModel

from backend.database import Statement
from backend.resources.models import CALLER
from backend.resources.types import NotBlank, Storable

_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")
# Parameters, aliases and columns in link.sql.
_OWN_NAMES = frozenset({
    "changed", "folded", "id", "link", "links", "n", "name", "names", "one", "owner", "owner_id", "owners", "renamed",
    "told", "updated_at", "version",
})  # fmt: skip

NAME_LENGTH = 50
MAX_NAMES = 20  # of one row

Name = Annotated[str, MemberField(min_length=1, max_length=NAME_LENGTH), Storable, NotBlank]
Names = Annotated[list[Name], MemberField(max_length=MAX_NAMES)]
NamesOrNull = Annotated[Names | None, AfterValidator(lambda names: names or [])]  # null means no names


class Named(SQLModel):
    """A label, unique per owner by its case-folded name."""

    owner_id: UUID = Field(primary_key=True, foreign_key="users.id", ondelete="CASCADE")
    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    name: str = Field(sa_type=Text)
    folded: str = Field(
        sa_type=Text(collation="C"),
        sa_column_args=[Computed("casefold(name COLLATE pg_unicode_fast)", persisted=True)],
    )

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[UniqueConstraint, CheckConstraint]:
        return (
            UniqueConstraint("owner_id", "folded", name=f"{cls.__tablename__}_name"),
            CheckConstraint(f"char_length(name) between 1 and {NAME_LENGTH}", name=f"{cls.__tablename__}_name_length"),
        )


def shown_names() -> Any:
    """A column for the names of a row's labels, sorted. It is a copy that the triggers of the migration maintain."""
    options = {"server_default": text("'{}'"), "info": {"bookkeeping": True}}
    return Field(sa_type=ARRAY(Text), sa_column_kwargs=options)


@dataclass(frozen=True, eq=False)
class Link:
    """The tables of a link, and parts of statements for it. Names are given as a parameter, a list of texts.

    Names are compared by case folding. A statement of `write` needs `LOCK_CHANGES` first.
    """

    table: Table
    rows: Table
    labels: Table
    row_id: Column[UUID]
    label_id: Column[UUID]
    shown: Column[list[str]]

    def names(self, parameter: str) -> ColumnElement[list[str]]:
        """The names that a row with these labels shows: sorted, each in the spelling that was stored first."""
        given = (
            func.unnest(bindparam(parameter, type_=ARRAY(Text)))
            .table_valued("name", with_ordinality="place")
            .render_derived("given")
        )
        folded = _folded(given.c.name)
        columns: list[Any] = [given.c.name, folded.label("folded")]
        first = select(*columns).ext(postgresql.distinct_on(folded)).order_by(folded, given.c.place).subquery("first")
        known = and_(self.labels.c.owner_id == CALLER, self.labels.c.folded == first.c.folded)
        names = select(func.coalesce(self.labels.c.name, first.c.name)).select_from(first.outerjoin(self.labels, known))
        return func.array(names.order_by(first.c.folded).scalar_subquery())

    def write(self, statement: Insert | Update, parameter: str, *returning: Any) -> Statement:
        """Write a row, replace its labels, create missing ones, and return these columns, which include `id`."""
        values = {self.shown.name: self.names(parameter)}
        row = statement.values(values).returning(*returning).cte("written")
        name = func.unnest(bindparam(parameter, type_=ARRAY(Text))).column_valued("name")
        created = (
            postgresql.insert(self.labels)
            .from_select(["owner_id", "name"], select(CALLER, name).where(exists(select(row.c.id))))
            .on_conflict_do_nothing()
            .returning(self.labels.c.id)
            .cte("created")
        )
        wanted = (
            select(self.labels.c.id)
            .where(self.labels.c.owner_id == CALLER, self.labels.c.folded.in_(_distinct(parameter)))
            .union_all(select(created.c.id))
            .cte("wanted")
        )
        removed = (
            delete(self.table)
            .where(self.table.c.owner_id == CALLER, self.row_id == select(row.c.id).scalar_subquery())
            .where(self.label_id.not_in(select(wanted.c.id)))
            .cte("removed")
        )
        added = (
            postgresql.insert(self.table)
            .from_select(self.table.c.keys(), select(CALLER, row.c.id, wanted.c.id).join(wanted, true()))
            .on_conflict_do_nothing()
            .cte("added")
        )
        return Statement(select(*row.c).add_cte(removed, added))

    def all_of(self, parameter: str) -> ColumnElement[bool]:
        """A filter: the row has all of these labels."""
        number = select(func.count()).select_from(_distinct(parameter).subquery()).scalar_subquery()
        found = (
            select(self.row_id)
            .join(self.labels, and_(self.table.c.owner_id == self.labels.c.owner_id, self.label_id == self.labels.c.id))
            .where(self.table.c.owner_id == CALLER, self.labels.c.owner_id == CALLER)
            .where(self.labels.c.folded.in_(_distinct(parameter)))
        )
        return self.rows.c.id.in_(found.group_by(self.row_id).having(func.count() == number))

    def count(self, *conditions: ColumnElement[bool]) -> ColumnElement[int]:
        """For a statement on the labels: the number of rows with this label that meet the conditions."""
        return (
            select(func.count())
            .select_from(self.table)
            .join(self.rows, and_(self.rows.c.owner_id == self.table.c.owner_id, self.rows.c.id == self.row_id))
            .where(*conditions, self.table.c.owner_id == CALLER, self.label_id == self.labels.c.id)
            .correlate(self.labels)
            .scalar_subquery()
        )


def link(name: str, *, names: str, **ends: type[SQLModel]) -> Link:
    """Link rows to labels of the same owner, such as `link("task_tags", task=Task, tag=Tag, names="tag_names")`.

    This table has the columns `owner_id`, `task_id` and `tag_id`. `names`: the rows' column made by `shown_names`. The
    migration calls the function of the same name in `backend.migrations`. Raises ValueError for names that the SQL of
    its triggers cannot contain.
    """
    (row, rows), (label, labels) = ((end, _table(model)) for end, model in ends.items())
    _check_names(name, names, (row, rows), (label, labels))
    row_id, label_id = (Column(f"{end}_id", Uuid, primary_key=True) for end in (row, label))
    table = Table(
        name,
        rows.metadata,
        Column("owner_id", Uuid, primary_key=True),
        row_id,
        label_id,
        ForeignKeyConstraint(["owner_id", row_id.name], [rows.c.owner_id, rows.c.id], ondelete="CASCADE"),
        ForeignKeyConstraint(["owner_id", label_id.name], [labels.c.owner_id, labels.c.id], ondelete="CASCADE"),
        Index(f"{name}_by_{label}", "owner_id", label_id.name, row_id.name),
    )
    found = Link(table, rows, labels, row_id, label_id, rows.c[names])
    rows.metadata.info.setdefault("links", []).append(found)
    return found


def _check_names(table: str, names: str, *ends: tuple[str, Table]) -> None:
    """SQL would take these names for key words, or resolve them to a column in place of a parameter."""
    for name in (table, names, *chain.from_iterable((end, its_table.name) for end, its_table in ends)):
        if not _PLAIN_NAME.fullmatch(name) or name in RESERVED_WORDS:
            raise ValueError(f"link {table}: {name} is not a name in lower case, or a key word of SQL")
    if used := _OWN_NAMES.intersection(end for end, _ in ends):
        raise ValueError(f"link {table}: its triggers use the name {min(used)}: choose another for this end")
    for _, its_table in ends:
        for column in {"owner", "changed", "owners", *(other for other, _ in ends)} & set(its_table.c.keys()):
            raise ValueError(f"link {table}: its triggers use the name {column}: rename {its_table.name}.{column}")
    if names in ("names", "owner"):
        raise ValueError(f"link {table}: its triggers use the name {names}: choose another for the column")


def _table(model: type[SQLModel]) -> Table:
    table = inspect(model).local_table
    assert isinstance(table, Table)
    return table


def _folded(name: ColumnElement[Any]) -> ColumnElement[str]:
    return collate(func.casefold(collate(name, "pg_unicode_fast")), "C")


def _distinct(parameter: str) -> Select[str]:
    """The distinct case-folded names in a parameter."""
    name = func.unnest(bindparam(parameter, type_=ARRAY(Text))).column_valued("name")
    return select(_folded(name).label("folded")).distinct()
