"""Tables and indexes of tasks and tags."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    ColumnElement,
    Computed,
    DateTime,
    Index,
    Text,
    case,
    literal_column,
    text,
)
from sqlalchemy.sql.elements import Grouping
from sqlmodel import Field, SQLModel

from backend.resources.links import Named, link, shown_names
from backend.resources.models import Synced

TITLE_LENGTH = 200
DESCRIPTION_LENGTH = 10_000


class Status(StrEnum):
    todo = "todo"
    in_progress = "in_progress"
    done = "done"


class Priority(StrEnum):
    low = "low"
    normal = "normal"
    high = "high"
    urgent = "urgent"


# Case-folded text contains no capital letter, so no search text can match across the X between title and description.
FOLDED = (
    "((casefold(title COLLATE pg_unicode_fast) || 'X'::text)"
    " || casefold(COALESCE(description, ''::text) COLLATE pg_unicode_fast))"
)

# A search reads the texts from a covering index with all columns of filters and sort orders, instead of the table. An
# index row has at most 2,704 bytes, so longer texts are read from the table.
SHORT, LONG = "octet_length(folded) <= 1500", "octet_length(folded) > 1500"
LISTED = ["title", "status", "priority", "due_at", "created_at", "updated_at"]
LIVE = "deleted_at IS NULL"


class Task(Synced, table=True):
    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"char_length(title) between 1 and {TITLE_LENGTH}", name="tasks_title_length"),
        CheckConstraint(f"char_length(description) <= {DESCRIPTION_LENGTH}", name="tasks_description_length"),
        CheckConstraint("status in ('todo', 'in_progress', 'done')", name="tasks_status"),
        CheckConstraint("priority in ('low', 'normal', 'high', 'urgent')", name="tasks_priority"),
        CheckConstraint("(status = 'done') = (completed_at is not null)", name="tasks_completed_when_done"),
        Index("tasks_by_number", "owner_id", "n", "id"),
        Index("tasks_in_the_bin", "owner_id", "deleted_at", postgresql_where=text("deleted_at is not null")),
        Index("tasks_to_purge", "deleted_at", "owner_id", "id", postgresql_where=text("deleted_at is not null")),
        Index(
            "tasks_by_text",
            "owner_id",
            "id",
            postgresql_include=["folded", *LISTED],
            postgresql_where=text(f"{LIVE} AND {SHORT}"),
        ),
        Index("tasks_by_long_text", "owner_id", "id", postgresql_where=text(f"{LIVE} AND {LONG}")),
    )

    title: str = Field(sa_type=Text(collation="C"))  # sorts by code point
    description: str | None = Field(default=None, sa_type=Text)
    status: Status = Field(sa_type=Text)
    priority: Priority = Field(sa_type=Text)
    due_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    completed_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    folded: str = Field(sa_type=Text, sa_column_args=[Computed(FOLDED, persisted=True)])
    tag_names: list[str] = shown_names()


class Tag(Named, table=True):
    __tablename__ = "tags"


TAGS = link("task_tags", task=Task, tag=Tag, names="tag_names")

LEVELS = tuple(enumerate(Priority))


def sort_key(sort: str, value: ColumnElement[Any]) -> ColumnElement[Any]:
    """The sort key of a column or cursor value: priorities as declared, missing due dates last.

    Under row-level security, PostgreSQL uses an index only for leakproof expressions. CASE is leakproof; `coalesce` and
    comparisons of enum types are not.
    """
    match sort:
        case "due_at":
            return case((value.is_(None), literal_column("'infinity'::timestamptz")), else_=value)
        case "-due_at":
            return case((value.is_(None), literal_column("'-infinity'::timestamptz")), else_=value)
        case "priority" | "-priority":
            return case(*((value == literal_column(f"'{name}'"), literal_column(f"{n}")) for n, name in LEVELS))
    return value


COLUMNS = SQLModel.metadata.tables["tasks"].c
INDEXES = [
    Index(
        name,
        COLUMNS.owner_id,
        Grouping(sort_key(sort, COLUMNS[sort.removeprefix("-")])),
        COLUMNS.id,
        postgresql_where=COLUMNS.deleted_at.is_(None),
    )
    for name, sort in {
        "tasks_by_creation": "created_at",
        "tasks_by_change": "updated_at",
        "tasks_by_due_date": "due_at",
        "tasks_by_due_date_descending": "-due_at",
        "tasks_by_priority": "priority",
        "tasks_by_title": "title",
    }.items()
]
