"""What a task is in the database."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import CheckConstraint, DateTime, Enum, ForeignKey, Index, Text, func, text
from sqlmodel import Field, SQLModel

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


class Task(SQLModel, table=True):
    """The key leads with the owner: an id is unique per owner, so clients may choose it and learn nothing of others."""

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"char_length(title) between 1 and {TITLE_LENGTH}", name="tasks_title_length"),
        CheckConstraint(f"char_length(description) <= {DESCRIPTION_LENGTH}", name="tasks_description_length"),
        CheckConstraint("status in ('todo', 'in_progress', 'done')", name="tasks_status"),
        CheckConstraint("(status = 'done') = (completed_at is not null)", name="tasks_completed_when_done"),
        Index("tasks_by_creation", "owner_id", "created_at", "id", postgresql_where=text("deleted_at is null")),
    )

    owner_id: UUID = Field(primary_key=True, sa_column_args=[ForeignKey("users.id", ondelete="CASCADE")])
    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    title: str = Field(sa_type=Text)
    description: str | None = Field(default=None, sa_type=Text)
    status: Status = Field(sa_type=Text)
    # An enum type, because PostgreSQL sorts its values as they are declared.
    priority: Priority = Field(sa_type=Enum(Priority, name="task_priority"))
    due_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    completed_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    version: int = Field(sa_column_kwargs={"server_default": text("1")})
    created_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
    deleted_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
